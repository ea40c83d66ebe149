"""The demo: a random SIREN, STRAINER and recipe `fast` on brain scans of another person, in numbers and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import Tensor

from strainer_fast._checks import InputError
from strainer_fast._files import atomic_writer
from strainer_fast.fitting import FitResult, Progress, fit, pretrain, recipe
from strainer_fast.fitting.record import Curve
from strainer_fast.fitting.rendering import render
from strainer_fast.models import Encoder
from strainer_fast.signals import Signal, samples

SIZE = 72
PRETRAIN_STEPS, FAST_PRETRAIN_STEPS = 600, 200
STEPS = 150
"""Small enough for five minutes on two CPU cores; the paper has 178x178, 5000 and 2000."""

TEST_IMAGES = (1, 4, 6, 8)
TABLE_STEPS = (0, 10, 25, 50, 100, 150)
PICTURE_STEPS = (10, 25, 50, 150)
TARGETS = (30, 35, 40)

METHODS = ("SIREN", "STRAINER", "fast")
"""Random SIREN and the paper's STRAINER, both with Adam; recipe `fast` from an encoder of its own."""
COLOURS = ("#777777", "#1f77b4", "#d62728")


@dataclass
class DemoResult:
    """Everything the table and the picture show, all from one run."""

    encoders: dict[str, Encoder]  # by recipe
    test: list[Signal]
    results: dict[str, list[FitResult]] = field(default_factory=dict)  # one per test image
    snapshots: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # first test image, [H, W, C]

    def curves(self, method: str) -> list[Curve]:
        """PSNR curves of a method, one per test image."""
        return [r.curves[0] for r in self.results[method]]

    def mean_psnr(self, method: str, step: int) -> float:
        """dB after `step` steps, mean over the test images."""
        return float(np.mean([c.psnr[step] for c in self.curves(method)]))

    def seconds_to(self, method: str, target: float) -> tuple[float, int]:
        """(median seconds of the images that reached `target` dB, how many did)."""
        times = [c.seconds[np.argmax(c.psnr >= target)] for c in self.curves(method) if c.psnr.max() >= target]
        return (float(np.median(times)) if times else float("nan")), len(times)

    def as_dict(self) -> dict[str, Any]:
        """The numbers as JSON data."""
        times = {m: {t: self.seconds_to(m, t) for t in TARGETS} for m in METHODS}
        return {
            "size": SIZE,
            "pretrain_steps": {name: e.record["steps"] for name, e in self.encoders.items()},
            "steps": STEPS,
            "test_images": [s.name for s in self.test],
            "pretrain_seconds": {name: e.record["seconds"] for name, e in self.encoders.items()},
            "psnr": {m: {str(k): self.mean_psnr(m, k) for k in TABLE_STEPS} for m in METHODS},
            "seconds_to": {
                m: {str(t): {"median": s if n else None, "reached": n} for t, (s, n) in times[m].items()}
                for m in METHODS
            },
        }


def require_matplotlib() -> None:
    """Fail before minutes of work when the picture cannot be drawn.

    Raises InputError.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InputError(
            "the demo draws with matplotlib, which is missing. pip install 'strainer-fast[plots]'"
        ) from None


Update = Callable[[int, str], None]
"""update(steps done, note)"""


def learn(seed: int, implementation: str, device: str, update: Update) -> dict[str, Encoder]:
    """Pre-train on the ten sample scans, as the paper does and as `fast` does."""
    encoders = {}
    for name, steps, before in (("paper", PRETRAIN_STEPS, 0), ("fast", FAST_PRETRAIN_STEPS, PRETRAIN_STEPS)):

        def look(progress: Progress, name: str = name, before: int = before) -> None:
            note = f"{name}: {min(progress.psnr):.1f} to {max(progress.psnr):.1f} dB"
            update(before + progress.step, note)

        encoders[name] = pretrain(
            samples("brain-mri", "train", size=SIZE),
            recipe(name, pretrain_steps=steps, seed=seed),
            implementation=implementation,
            device=device,
            on_check=look,
        )
    return encoders


def compare(encoders: dict[str, Encoder], seed: int, implementation: str, device: str, update: Update) -> DemoResult:
    """Fit four scans of another person, three ways each."""
    everything = samples("brain-mri", "test", size=SIZE)
    demo = DemoResult(encoders, [everything[i] for i in TEST_IMAGES], {m: [] for m in METHODS})
    ways: dict[str, tuple[Encoder | str, str]] = {
        "SIREN": ("siren", "paper"),
        "STRAINER": (encoders["paper"], "paper"),
        "fast": (encoders["fast"], "fast"),
    }
    for i, signal in enumerate(demo.test):
        # One image after another, the methods in turn: a busy machine then hurts all three alike.
        for m, (method, (init, preset)) in enumerate(ways.items()):

            def look(progress: Progress, i: int = i, m: int = m, method: str = method) -> None:
                done = (i * len(METHODS) + m) * STEPS + progress.step
                update(done, f"{demo.test[i].name}, {method}: {progress.psnr[0]:.1f} dB")
                if i == 0 and progress.step in PICTURE_STEPS:
                    demo.snapshots[method, progress.step] = render(progress.module(0), (SIZE, SIZE))

            result = fit(
                signal,
                init,
                recipe(preset, steps=STEPS, check_every=1, seed=seed),
                implementation=implementation,
                device=device,
                on_check=look,
            )
            demo.results[method].append(result)
    return demo


def tables(demo: DemoResult) -> tuple[list[Sequence[str]], list[Sequence[str]]]:
    """(PSNR by step, seconds to a target) as rows of text, header first."""
    num = len(demo.test)
    psnr: list[Sequence[str]] = [("PSNR dB at step", *(str(k) for k in TABLE_STEPS))]
    seconds: list[Sequence[str]] = [("seconds to reach", *(f"{t} dB" for t in TARGETS))]
    for method in METHODS:
        psnr.append((method, *(f"{demo.mean_psnr(method, k):.1f}" for k in TABLE_STEPS)))
        cells = []
        for target in TARGETS:
            median, reached = demo.seconds_to(method, target)
            cells.append(
                f"{median:.1f}"
                if reached == num
                else f"{median:.1f} ({reached} of {num})"
                if reached
                else "not reached"
            )
        seconds.append((method, *cells))
    return psnr, seconds


def draw(demo: DemoResult, path: Path) -> None:
    """One picture: truth, reconstructions as they emerge, error maps, PSNR curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = cast("tuple[Any, Any]", figure.subfigures(1, 2, width_ratios=(1.75, 1)))
    columns = len(PICTURE_STEPS)
    axes = left.subplots(len(METHODS), columns + 2)
    truth = demo.test[0].values
    for row, method in enumerate(METHODS):
        psnr = demo.curves(method)[0].psnr
        pictures = [demo.snapshots[method, k] for k in PICTURE_STEPS]
        for axis, step, picture in zip(axes[row, 1:], PICTURE_STEPS, pictures, strict=False):
            _show(axis, picture)
            axis.set_title(f"step {step}: {psnr[step]:.1f} dB", fontsize=9)
        _show(axes[row, -1], (pictures[2] - truth).abs() * 10, cmap="inferno")
        axes[row, -1].set_title(f"error ×10, step {PICTURE_STEPS[2]}", fontsize=9)
        _show(axes[row, 0], truth)
        axes[row, 0].set_title("ground truth" if row == 0 else "", fontsize=9)
        axes[row, 0].text(
            -0.12, 0.5, method, transform=axes[row, 0].transAxes, rotation=90, ha="center", va="center",
            fontsize=11, fontweight="bold", color=COLOURS[row],
        )  # fmt: skip
    left.suptitle(f"A brain scan nobody trained on ({demo.test[0].name}, {SIZE}×{SIZE})", fontsize=12)

    by_step = right.subplots()
    for method, colour in zip(METHODS, COLOURS, strict=True):
        curves = np.stack([c.psnr for c in demo.curves(method)])
        by_step.fill_between(range(STEPS + 1), curves.min(0), curves.max(0), color=colour, alpha=0.15, lw=0)
        by_step.plot(curves.mean(0), color=colour, lw=2, label=f"{method}: {curves.mean(0)[-1]:.1f} dB at {STEPS}")
    by_step.legend(loc="lower right", frameon=False)
    by_step.set(xlabel="optimiser steps", ylabel="PSNR (dB)", xlim=(0, STEPS), xmargin=0)
    by_step.spines[["top", "right"]].set_visible(False)
    by_step.grid(alpha=0.25)
    right.suptitle(f"PSNR, mean and range of {len(demo.test)} unseen scans", fontsize=12)
    with atomic_writer(path) as file:
        figure.savefig(file, format="png", dpi=110)


def _show(axis: Any, image: Tensor, cmap: str = "gray") -> None:
    axis.imshow(image.squeeze(-1).numpy(), cmap=cmap, vmin=0, vmax=1, interpolation="nearest")
    axis.set_axis_off()

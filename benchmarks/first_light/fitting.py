"""Stages 3, 5 and 6: fits beside the CPU's, seconds to a PSNR, fits per second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import strainer_fast as sf
from strainer_fast.benchmarks.time_to_psnr.methods import TUNED

if TYPE_CHECKING:
    from strainer_fast.benchmarks.first_light.rows import Log
    from strainer_fast.benchmarks.first_light.stages import Run

TINY = sf.Architecture(hidden_features=16, num_layers=3, num_shared_layers=2)
SMALL = {width: sf.Architecture(hidden_features=width, num_layers=4, num_shared_layers=3) for width in (32, 64)}


def scan(small: bool) -> list[sf.Signal]:
    """One unseen scan, 178x178."""
    return sf.signals.samples("brain-mri", "test", size=8 if small else 178)[2:3]


def photos(count: int, size: int) -> list[sf.Signal]:
    """As many photographs; the same ones again under other names, which draw other networks."""
    found = sf.signals.samples("photos", "all", size=size)
    return [replace(p, name=f"{p.name}-{again}") for again in range(-(-count // len(found))) for p in found][:count]


def seconds_of(
    signals: list[sf.Signal],
    init: Any,
    recipe: sf.Recipe,
    small: bool = False,
    architecture: sf.Architecture | None = None,
    **how: Any,
) -> tuple[float, sf.FitResult]:
    """A fit and how long it took, results on the host included."""
    if not isinstance(init, sf.Encoder):
        how["architecture"] = TINY if small else architecture
    how.setdefault("device", "cuda")
    begin = time.perf_counter()
    found = sf.fit(signals, init, recipe, **how)
    return time.perf_counter() - begin, found


def against_the_cpu(run: Run) -> None:
    """`paper` and `fast` on one scan: on the GPU first, then on the CPU, and how far apart their PSNR is."""
    lengths = {"paper": 3, "fast": 2} if run.small else {"paper": 100, "fast": 20}
    found: dict[tuple[str, str], float] = {}

    def fit(name: str, precision: str, device: str) -> None:
        recipe = sf.recipe(name, steps=lengths[name], precision="fp32" if device == "cpu" else precision)
        how: dict[str, Any] = {"device": device} | ({"implementation": "tiled"} if device == "cpu" else {})
        seconds, result = seconds_of(scan(run.small), "siren", recipe, run.small, **how)
        row = {"what": "fit", "recipe": name, "precision": precision, "device": device, "steps": lengths[name]}
        found[name, f"{device} {precision}"] = result.psnr[0]
        run.log.row(**row, psnr=result.psnr[0], seconds=seconds, ran=result.settings["environment"]["implementation"])
        if device == "cpu":
            for (other, where), psnr in found.items():
                if other == name and where.startswith("cuda"):
                    run.log.row(
                        what="beside the CPU",
                        recipe=name,
                        where=where,
                        psnr=psnr,
                        cpu=result.psnr[0],
                        off_db=psnr - result.psnr[0],
                    )

    ways = [(name, precision, "cuda") for name in ("paper", "fast") for precision in ("fp32", "auto")]
    ways += [(name, "fp32", "cpu") for name in ("paper", "fast")]
    run.log.each([({"what": "fit", "ways": " ".join(way)}, partial(fit, *way)) for way in ways])


def time_to_psnr(run: Run) -> None:
    """Seconds to 35 and 40 dB of `fast`, `paper` and a tuned SIREN on a scan, from random weights or an encoder."""
    limit = {"fast": 3, "paper": 4} if run.small else {"fast": 300, "paper": 2000}
    encoders: dict[str, sf.Encoder] = {}

    def pretrain() -> None:
        signals = sf.signals.samples("brain-mri", size=8 if run.small else 178)[: 2 if run.small else 10]
        recipe = sf.recipe("fast", pretrain_steps=2 if run.small else 200)
        for name in ("first", "again"):  # the first one compiles
            begin = time.perf_counter()
            encoders["scans"] = sf.pretrain(signals, recipe, architecture=TINY if run.small else None, device="cuda")
            run.log.row(what="pretrain", which=name, steps=recipe.pretrain_steps, seconds=time.perf_counter() - begin)

    def to(name: str, init: str, target: float, changes: dict[str, Any]) -> None:
        preset = "fast" if name == "fast" else "paper"
        recipe = sf.recipe(preset, **changes, steps=limit[preset], target_psnr=target)
        start: Any = encoders["scans"] if init == "encoder" else init
        seconds_of(scan(run.small), start, sf.recipe(recipe, steps=3), run.small)
        seconds, result = seconds_of(scan(run.small), start, recipe, run.small)
        one = result.signals[0]
        run.log.row(
            what="to PSNR",
            recipe=name,
            init=init,
            target=target,
            seconds=seconds,
            steps=one.steps,
            psnr=one.psnr,
            stopped=one.stop_reason,
        )

    items: list[tuple[dict[str, Any], Callable[[], object]]] = [({"what": "pretrain"}, pretrain)]
    ways: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("fast", "encoder", {}),
        ("fast", "siren", {}),
        ("tuned SIREN", "siren", TUNED),
        ("paper", "encoder", {}),
    )
    for target in (35.0, 40.0):
        for name, init, changes in ways:
            about = {"what": "to PSNR", "recipe": name, "init": init, "target": target}
            items.append((about, partial(to, name, init, target, changes)))
    run.log.each(items)


def fits_per_second(run: Run) -> None:
    """Small networks on photographs: stacks of Adam, the recipe `small` with its looks, whole data sets."""
    items: list[tuple[dict[str, Any], Callable[[], object]]] = []

    def add(name: str, count: int, width: int, recipe: sf.Recipe) -> None:
        about = {"what": "fits", "name": name, "count": count, "width": width}
        items.append((about, partial(_fits, run.log, about, recipe, run.small)))

    if run.small:
        add("paper, 200 steps", 3, 32, sf.recipe("paper", steps=2))
        add("small, to 30 dB", 3, 32, sf.recipe("small", steps=3, target_psnr=30.0))
    else:
        for count in (1024, 64, 264):
            add("paper, 200 steps", count, 32, sf.recipe("paper", steps=200))
        add("small, 200 steps", 1024, 32, sf.recipe("small", steps=200))
        add("small, 200 steps, a look every 25", 1024, 32, sf.recipe("small", steps=200, check_every=25))
        add("small, to 30 dB", 1024, 32, sf.recipe("small", steps=500, target_psnr=30.0))
        add("paper, 200 steps", 1024, 64, sf.recipe("paper", steps=200))
        add("small, to 30 dB", 1024, 64, sf.recipe("small", steps=500, target_psnr=30.0))
        add("fast, to 30 dB", 334, 32, sf.recipe("fast", steps=60, target_psnr=30.0))
    run.log.each(items)


def _fits(log: Log, about: dict[str, Any], recipe: sf.Recipe, small: bool) -> None:
    signals = photos(about["count"], 8 if small else 28)
    architecture = SMALL[about["width"]]
    first, _ = seconds_of(signals, "siren", sf.recipe(recipe, steps=3), architecture=architecture)
    seconds, result = seconds_of(signals, "siren", recipe, architecture=architecture)
    done = sum(one.steps for one in result.signals)
    log.row(
        **about,
        seconds=seconds,
        first_s=first,
        fits_per_s=len(signals) / seconds,
        network_steps_per_s=done / seconds,
        psnr=statistics.median(result.psnr),
        ran=result.settings["environment"]["implementation"],
        memory_mb=torch.cuda.max_memory_allocated() / 1e6,
    )

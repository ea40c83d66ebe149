"""Tables and plots from the rows of the report, of the timing and of the search."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from strainer_fast.benchmarks.tables import replace_between
from strainer_fast.benchmarks.time_to_psnr.__main__ import (
    DENOISING,
    FILES,
    RESULTS,
    SMALL_SIZE,
    TIMING,
    first_step,
    read_rows,
)
from strainer_fast.benchmarks.time_to_psnr.domains import SEARCH_SIZE
from strainer_fast.benchmarks.time_to_psnr.methods import REPORTED, Method

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "recipes.md"
SUMMARY = RESULTS / "time-to-psnr.json"
PICTURES = ROOT / "docs" / "pictures"
TARGETS = (30, 35, 40, 45, 50)
AMORTISED = (1, 10, 100, 1000)
Row = dict[str, Any]


def median(values: Sequence[float]) -> float:
    """The upper one of an even number; infinite where half or more are, for a target that most images never reach."""
    return float(np.sort(np.asarray(values, dtype=float))[len(values) // 2]) if values else math.nan


def steps_to(row: Row, target: float) -> float:
    """Infinite where the fit never reached it."""
    step = first_step(row["psnr"], target)
    return math.inf if step is None else float(step)


class Report:
    """All rows that the tables are made of."""

    def __init__(self) -> None:
        self.rows = read_rows(RESULTS / FILES["report"])
        self.timing = {(t["method"], t["domain"]): t for t in read_rows(TIMING)}  # the last measurement counts
        order = [m.name for m in REPORTED]
        self.methods = [m for m in REPORTED if any(r["method"] == m.name for r in self.rows)]
        self.rows.sort(key=lambda r: order.index(r["method"]) if r["method"] in order else len(order))

    def of(self, method: Method, domain: str | None = None) -> list[Row]:
        """Rows of a method, on one domain or all."""
        return [r for r in self.rows if r["method"] == method.name and domain in (None, r["domain"])]

    @property
    def complete(self) -> list[Method]:
        """Methods with a row for every image: only their medians may stand side by side in a plot."""
        images = {(r["domain"], r["image"]) for r in self.rows}
        return [m for m in self.methods if len(self.of(m)) == len(images)]

    @property
    def domains(self) -> list[str]:
        """In the order of the rows."""
        return list(dict.fromkeys(r["domain"] for r in self.rows))

    def seconds_to(self, row: Row, target: float) -> float:
        """Start and steps of a fit by the interleaved timing of its method and domain."""
        timed = self.timing.get((row["method"], row["domain"]))
        if timed is None:
            return math.nan
        return float(timed["start_seconds"] + steps_to(row, target) * timed["step_seconds"])

    def pretraining_seconds(self, row: Row) -> float:
        """Of the encoder behind a row, by the interleaved timing of its steps; 0 without one."""
        timed = self.timing.get((row["method"], row["domain"]))
        if row["pretraining"] is None or timed is None:
            return 0.0 if row["pretraining"] is None else math.nan
        return float(row["pretraining"]["steps"] * timed["pretrain_step_seconds"])


def number(value: float, form: str = ".0f") -> str:
    """For a cell."""
    return "not reached" if math.isinf(value) else "" if math.isnan(value) else format(value, form)


def by_target(report: Report, measure: Callable[[Row, float], float], form: str, domain: str | None) -> list[str]:
    """A line per method: median to each target, lowest to highest in brackets, and how many images reached it."""
    lines = [f"| method | images | {' | '.join(f'{t} dB' for t in TARGETS)} |", "|---" * (2 + len(TARGETS)) + "|"]
    for method in report.methods:
        rows = report.of(method, domain)
        if not rows:
            continue
        cells = []
        for target in TARGETS:
            values = [measure(r, target) for r in rows]
            reached = [v for v in values if math.isfinite(v)]
            spread = f" ({number(min(reached), form)} to {number(max(reached), form)})" if len(reached) > 1 else ""
            missing = f", {len(reached)} of {len(rows)}" if 0 < len(reached) < len(rows) else ""
            cells.append(number(median(values), form) + spread + missing)
        lines.append(f"| {label(method, rows)} | {len(rows)} | {' | '.join(cells)} |")
    return lines


def label(method: Method, rows: Sequence[Row]) -> str:
    """Its name, and the budget that its encoder had."""
    budgets = sorted({(r["pretraining"]["steps"], r["pretraining"]["shape"][0]) for r in rows if r["pretraining"]})
    words = [f"{'/'.join(f'{steps} steps at {side}' for steps, side in budgets)}"] if budgets else []
    words += [method.note] if method.note else []
    return f"{method.name}{f' ({chr(59).join(words)})' if words else ''}"


def amortised(report: Report, target: float = 40) -> list[str]:
    """Seconds to a target with pre-training shared by a number of fits."""
    lines = [
        f"| seconds to {target:.0f} dB | {' | '.join(f'{n} fits' for n in AMORTISED)} |",
        "|---" * (1 + len(AMORTISED)) + "|",
    ]
    for method in report.methods:
        rows = report.of(method)
        values = [(report.seconds_to(r, target), report.pretraining_seconds(r)) for r in rows]
        cells = [number(median([s + p / n for s, p in values]), ".1f") for n in AMORTISED]
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
    return lines


def exactness(report: Report) -> list[str]:
    """Steps until every rounded pixel is right, per domain."""
    lines = [
        f"| steps to exact 8-bit values | {' | '.join(report.domains)} |",
        "|---" * (1 + len(report.domains)) + "|",
    ]
    for method in report.methods:
        cells = []
        for domain in report.domains:
            rows = report.of(method, domain)
            steps = [len(r["psnr"]) - 1 if r["stop"] == "exact" else math.inf for r in rows]
            done = sum(math.isfinite(s) for s in steps)
            cells.append(
                f"{number(median(steps))}{f', {done} of {len(rows)}' if 0 < done < len(rows) else ''}" if rows else ""
            )
        lines.append(f"| {method.name} | {' | '.join(cells)} |")
    return lines


def search_table(path: Path, domain: str | None = None) -> list[str]:
    """Every lead that was tried, on one domain or all: medians over images and seeds."""
    rows = [r for r in read_rows(path) if domain in (None, r["domain"])]
    lines = ["| tried | fits | 30 dB | 35 dB | 40 dB | 50 dB | at the end | between pixels |", "|---" * 8 + "|"]
    for name, size in dict.fromkeys((r["method"], r["size"]) for r in rows):
        own = [r for r in rows if (r["method"], r["size"]) == (name, size)]
        cells = [number(median([steps_to(r, t) for r in own])) for t in (30, 35, 40, 50)]
        ends = [
            p for p in (next((p for p in reversed(r["psnr"]) if p is not None), None) for r in own) if p is not None
        ]
        between = [r["between"] for r in own if r.get("between") is not None]
        name += "" if size in (SEARCH_SIZE, SMALL_SIZE) else f", at {size}x{size}"
        lines.append(
            f"| {name} | {len(own)} | {' | '.join(cells)} | {median(ends):.1f} | {number(median(between), '.1f')} |"
        )
    return lines


def denoising_table() -> list[str]:
    """Best PSNR against the clean image, and the step it came at."""
    rows = read_rows(DENOISING)
    lines = ["| start and optimiser | fits | noisy | best | at step | at the end |", "|---" * 6 + "|"]
    for name in dict.fromkeys(r["method"] for r in rows):
        own = [r for r in rows if r["method"] == name]
        best = [max(r["clean_psnr"]) for r in own]
        at = [float(np.argmax(r["clean_psnr"])) for r in own]
        ends = [r["clean_psnr"][-1] for r in own]
        noisy = median([r["noisy"] for r in own])
        lines.append(
            f"| {name} | {len(own)} | {noisy:.1f} | {median(best):.1f} | {median(at):.0f} | {median(ends):.1f} |"
        )
    return lines


def curves(report: Report, method: Method, in_seconds: bool) -> tuple[Any, Any, Any, Any] | None:
    """(x, median, lowest, highest) PSNR of a method over all images; fits that stopped early keep their last value."""
    rows = report.of(method)
    length = max(len(r["psnr"]) for r in rows)
    held = np.array([r["psnr"] + r["psnr"][-1:] * (length - len(r["psnr"])) for r in rows], dtype=float)
    if not in_seconds:
        return np.arange(length), np.nanmedian(held, 0), np.nanmin(held, 0), np.nanmax(held, 0)
    timed = [report.timing.get((r["method"], r["domain"])) for r in rows]
    if any(t is None for t in timed):
        return None
    known = [t for t in timed if t is not None]
    longest = max(t["start_seconds"] + t["step_seconds"] * length for t in known)
    x = np.geomspace(0.2, longest, 300)
    at = [(x - t["start_seconds"]) / t["step_seconds"] for t in known]
    each = np.array([np.interp(a, np.arange(length), c, left=np.nan) for a, c in zip(at, held, strict=True)])
    enough = np.isfinite(each).all(0)
    return x[enough], np.median(each[:, enough], 0), each[:, enough].min(0), each[:, enough].max(0)


def draw(report: Report) -> list[Path]:
    """PSNR over steps and over seconds with the range of the images, and seconds to each target as bars."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    PICTURES.mkdir(exist_ok=True)
    colours = {m.name: colormaps["tab20"](i % 20) for i, m in enumerate(REPORTED)}
    figure = Figure(figsize=(13, 5.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for axis, in_seconds in zip(figure.subplots(1, 2), (False, True), strict=True):
        for method in report.complete:
            found = curves(report, method, in_seconds)
            if found is None:
                continue
            x, middle, low, high = found
            width = 2.6 if method.name == "fast" else 1.4
            axis.fill_between(x, low, high, color=colours[method.name], alpha=0.08, lw=0)
            axis.plot(x, middle, color=colours[method.name], lw=width, label=method.name)
        axis.set(ylabel="PSNR (dB)", ylim=(10, 80), xlabel="seconds" if in_seconds else "optimiser steps")
        axis.set_xscale("log" if in_seconds else "symlog")
        axis.set_xlim(left=0.2 if in_seconds else 0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle("PSNR on images nobody trained or tuned on: median, lowest and highest")
    paths = [PICTURES / "psnr-curves.png"]
    figure.savefig(paths[0], dpi=110)

    figure = Figure(figsize=(13, 4.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    share = 0.8 / max(len(report.complete), 1)
    for i, method in enumerate(report.complete):
        heights = [median([report.seconds_to(r, t) for r in report.of(method)]) for t in TARGETS]
        finite = [h if math.isfinite(h) else math.nan for h in heights]
        places = np.arange(len(TARGETS)) + i * share - 0.4
        axis.bar(places, finite, share, color=colours[method.name], label=method.name)
        for x, height in zip(places, heights, strict=True):
            if math.isinf(height):
                place = axis.get_xaxis_transform()
                axis.text(x, 0.01, "never", rotation=90, ha="center", va="bottom", fontsize=7, transform=place)
    axis.set_yscale("log")
    axis.set_xticks(range(len(TARGETS)), [f"{t} dB" for t in TARGETS])
    axis.set(ylabel="seconds, median over the images")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis.spines[["top", "right"]].set_visible(False)
    paths.append(PICTURES / "psnr-bars.png")
    figure.savefig(paths[1], dpi=110)
    return paths


def summary(report: Report) -> Row:
    """The numbers of the tables as data."""
    methods = {}
    for method in report.methods:
        rows = report.of(method)
        methods[method.name] = {
            "images": len(rows),
            "steps": {str(t): _plain(median([steps_to(r, t) for r in rows])) for t in TARGETS},
            "seconds": {str(t): _plain(median([report.seconds_to(r, t) for r in rows])) for t in TARGETS},
            "by_domain": {
                domain: {
                    "steps": {
                        str(t): _plain(median([steps_to(r, t) for r in report.of(method, domain)])) for t in TARGETS
                    },
                    "exact": sum(r["stop"] == "exact" for r in report.of(method, domain)),
                    "images": len(report.of(method, domain)),
                }
                for domain in report.domains
            },
        }
    return {"targets": TARGETS, "methods": methods}


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None


def write() -> None:
    """Summary, tables between the markers of docs/recipes.md, and plots."""
    report = Report()
    text = DOCUMENT.read_text()
    tables = {
        "steps": by_target(report, steps_to, ".0f", None),
        "seconds": by_target(report, report.seconds_to, ".1f", None),
        "amortised": amortised(report),
        "exact": exactness(report),
        "search": search_table(RESULTS / FILES["search"], "brain-mri"),
        "search on photos": search_table(RESULTS / FILES["search"], "photos"),
        "grid": search_table(RESULTS / FILES["grid"]),
        "small": search_table(RESULTS / FILES["small"]),
        "denoising": denoising_table(),
    }
    for domain in report.domains:
        tables[f"steps on {domain}"] = by_target(report, steps_to, ".0f", domain)
        tables[f"seconds on {domain}"] = by_target(report, report.seconds_to, ".1f", domain)
    for name, lines in tables.items():
        text = replace_between(text, name, lines)
    DOCUMENT.write_text(text)
    SUMMARY.write_text(json.dumps(summary(report), indent=1) + "\n")
    for path in draw(report) if report.rows else ():
        print(f"wrote {path.relative_to(ROOT)}")
    print(f"wrote {DOCUMENT.relative_to(ROOT)} and {SUMMARY.relative_to(ROOT)}")

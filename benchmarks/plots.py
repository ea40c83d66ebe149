"""Plots of a run as SVG, each for light and for dark pages."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from strainer_fast.benchmarks.harness import OURS, Row, Rows
from strainer_fast.benchmarks.tables import share_of_peak

THEMES = {
    "light": {"text": "#1f2328", "grid": "#d8dee4", "ours": "#b3261e",
              "others": ("#3b6ea5", "#6b8e23", "#8a5fa8", "#b07d2b", "#4f8f8b", "#7a7a7a", "#a0527f")},
    "dark": {"text": "#e6edf3", "grid": "#3d444d", "ours": "#ff8a80",
             "others": ("#79b8ff", "#a5d46a", "#c9a6e8", "#e3b75e", "#7fd1cc", "#b5b5b5", "#e88fbd")},
}  # fmt: skip
SIZE = (4.2, 3.7)
"""Inches: as wide as a phone, so that letters stay readable there."""


WIDE = 500
"""Largest over smallest value of an axis from which only powers of ten have labels."""


@dataclass(frozen=True)
class Plot:
    """Lines over an axis.

    Args:
        name: of its file.
        claim: the sentence above it.
        lines: provider -> points (x, y), by x.
        x, y: titles of the axes.
        log: which axes are logarithmic.
    """

    name: str
    claim: str
    lines: dict[str, list[tuple[float, float]]]
    x: str
    y: str
    log: str = "xy"


def _lines(rows: Rows, axis: str, value: Callable[[Row], float | None]) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        y = value(row) if "median_ms" in row else None
        if y is not None:
            found.setdefault(row["provider"], []).append((row["axes"][axis], y))
    return {name: sorted(points) for name, points in found.items() if len(points) > 1}


def plots(document: dict[str, Any]) -> list[Plot]:
    """Those that a run has at least two points of."""
    rows: Rows = document["rows"]

    def of(suite: str, **fields: Any) -> Rows:
        return [r for r in rows if r["suite"] == suite and all(r.get(k) == v for k, v in fields.items())]

    sizes = [r for r in of("step", table="sizes", threads=2) if r["axes"]["width"] == 256]
    widths = [r for r in of("step", table="sizes", threads=2) if r["axes"]["points"] == 178**2]
    sine = [r for r in of("layers", table="sine") if r["axes"]["width"] == 256]
    render = [r for r in of("render") if "crop" not in r["case"]]
    found = [
        Plot("step-latency", "A training step (forward, loss, backward) of a 5x256 network, by image",
             _lines(sizes, "points", lambda r: r["median_ms"]), "points", "ms a step"),
        Plot("step-throughput", "The same as throughput",
             _lines(sizes, "points", lambda r: r["axes"]["points"] / r["median_ms"] / 1e3), "points", "Mpoints/s"),
        Plot("step-peak", "Share of the machine's own matrix product, by width of the network",
             _lines(widths, "width", share_of_peak), "width", "share of sgemm", "x"),
        Plot("step-memory", "Memory of a step does not grow with the image",
             _lines(sizes, "points", lambda r: max(r["peak_mb"], 0.1) if r.get("peak_mb") is not None else None),
             "points", "peak MB"),
        Plot("layer-latency", "One sine layer 256 to 256, forward and backward",
             _lines(sine, "points", lambda r: r["median_ms"]), "points", "ms"),
        Plot("render-throughput", "Rendering, by size of the image",
             _lines(render, "points", lambda r: r["axes"]["points"] / r["median_ms"] / 1e3), "pixels", "megapixels/s"),
    ]  # fmt: skip
    for case in dict.fromkeys(r["case"] for r in of("fit")):
        own = [r for r in of("fit", case=case) if "curve" in r]
        by_step = {r["provider"]: [(float(i), float(p)) for i, p in enumerate(r["curve"]["psnr"])] for r in own}
        by_second = {r["provider"]: list(zip(*r["curve"].values(), strict=True)) for r in own}
        name = case.split()[1].rstrip(",")
        found.append(Plot(f"psnr-seconds-{name}", f"PSNR over seconds: {case}", by_second, "seconds", "PSNR dB", "x"))
        found.append(Plot(f"psnr-steps-{name}", f"PSNR over steps: {case}", by_step, "steps", "PSNR dB", ""))
    for data in dict.fromkeys(r["data"] for r in of("dataset")):
        for target in dict.fromkeys(r["target"] for r in of("dataset", data=data)):
            until = "fixed steps" if target is None else f"until {target:.0f} dB"
            name = f"fits-{data.split(',')[0].split()[-1]}-{'steps' if target is None else f'{target:.0f}dB'}"
            lines = _lines(of("dataset", data=data, target=target), "signals", lambda r: 1e3 / r["median_ms"])
            found.append(Plot(name, f"Fits per second: {data}, {until}", lines, "signals", "fits/s"))
    return [plot for plot in found if plot.lines]


def short(value: float) -> str:
    """2k for 2000, 1M for a million."""
    for unit, letter in ((1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def svg(plot: Plot, theme: str) -> str:
    """One plot; letters are text, so that they can be read aloud and stay sharp."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    colours: dict[str, Any] = THEMES[theme]
    # The same file for the same numbers: no date, no random identifiers; those of one page differ.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"{plot.name} {theme}", "font.size": 10}):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        others = iter(colours["others"] * 2)
        for provider, points in plot.lines.items():
            ours = provider == OURS
            style: dict[str, Any] = {"color": colours["ours"] if ours else next(others), "lw": 2.2 if ours else 1.3}
            if len(points) <= 12:
                style |= {"marker": "o", "ms": 4 if ours else 3}
            axes.plot(*zip(*points, strict=True), label=provider, zorder=3 if ours else 2, **style)
        values = dict(zip("xy", zip(*(p for line in plot.lines.values() for p in line), strict=True), strict=True))
        span = {letter: max(each) / max(min(each), 1e-9) for letter, each in values.items()}
        for letter, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if letter in plot.log:
                axes.set(**{f"{letter}scale": "log"})
                axis.set_major_locator(LogLocator(subs=(1,) if span[letter] > WIDE else (1, 2, 5), numticks=8))
                axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
                axis.set_minor_formatter(NullFormatter())
        if "y" not in plot.log and plot.y != "PSNR dB":
            axes.set_ylim(bottom=0)
        axes.set(xlabel=plot.x, ylabel=plot.y)
        axes.grid(color=colours["grid"], lw=0.6)
        for spine in axes.spines.values():
            spine.set_color(colours["grid"])
        axes.tick_params(which="both", colors=colours["text"], labelcolor=colours["text"])
        for label in (axes.xaxis.label, axes.yaxis.label):
            label.set_color(colours["text"])
        figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8.5, labelcolor=colours["text"])
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]

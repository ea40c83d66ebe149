"""Markdown tables of rows, for every suite."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from strainer_fast.benchmarks.harness import OURS, Row, Rows


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_between(text: str, name: str, lines: Sequence[str]) -> str:
    """`text` with these lines between the markers of table `name`."""
    pattern = re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    body = "\n".join(lines) + "\n"
    return pattern.sub(lambda m: f"{m[1]}{body}{m[2]}", text)


def spread(row: dict[str, Any], unit: float = 1.0) -> str:
    """Median (p20 to p80), three digits; nothing for a row that was refused."""
    if "median_ms" not in row:
        return "-"
    median, low, high = (number(unit * row[name]) for name in ("median_ms", "p20_ms", "p80_ms"))
    return f"{median} ({low} to {high})"


def number(value: float) -> str:
    """Three digits, and no exponent: 1230 rather than 1.23e+03."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def named_provider(row: dict[str, Any]) -> str:
    """Ours in bold."""
    return f"**{row['provider']}**" if row["provider"] == OURS else str(row["provider"])


def remark(row: Row) -> str:
    """Why a row has no time."""
    if "refused" in row:
        return f"refused: {row['refused']}"
    return f"not run: {row['not_run']}" if "not_run" in row else ""


def gflops(row: Row) -> float | None:
    """Of the products of a call."""
    return row["flops"] / row["median_ms"] / 1e6 if row.get("flops") and "median_ms" in row else None


def share_of_peak(row: Row) -> float | None:
    """Of what the machine's own product of matrices reached in the same rounds."""
    rate = gflops(row)
    return None if rate is None else rate / row["sgemm_gflops"]


def _cell(value: float | None, unit: str = "") -> str:
    return "" if value is None else f"{number(value)}{unit}"


def _ratio(row: Row, ours: Row | None) -> str:
    if ours is None or "median_ms" not in row or "median_ms" not in ours:
        return ""
    return f"{row['median_ms'] / ours['median_ms']:.2f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f} %"


COLUMNS: dict[str, dict[str, Callable[[Row, Row | None], str]]] = {
    "layers": {
        "threads": lambda r, o: str(r["threads"]),
        "ms (p20 to p80)": lambda r, o: spread(r),
        "against ours": _ratio,
        "GFLOP/s": lambda r, o: _cell(gflops(r)),
        "GB/s": lambda r, o: _cell(r["bytes"] / r["median_ms"] / 1e6 if "median_ms" in r and r.get("bytes") else None),
        "share of sgemm": lambda r, o: _percent(share_of_peak(r)),
        "peak MB": lambda r, o: _cell(r.get("peak_mb")),
    },
    "step": {
        "threads": lambda r, o: str(r["threads"]),
        "ms (p20 to p80)": lambda r, o: spread(r),
        "against ours": _ratio,
        "GFLOP/s": lambda r, o: _cell(gflops(r)),
        "share of sgemm": lambda r, o: _percent(share_of_peak(r)),
        "peak MB": lambda r, o: _cell(r.get("peak_mb")),
    },
    "fit": {
        "seconds (p20 to p80)": lambda r, o: spread(r, 1e-3),
        "against ours": _ratio,
        "steps": lambda r, o: str(r.get("steps", "")),
    },
    "dataset": {
        "fits/s": lambda r, o: _cell(1e3 / r["median_ms"] if "median_ms" in r else None),
        "ms a fit (p20 to p80)": lambda r, o: spread(r),
        "against ours": _ratio,
    },
    "render": {
        "ms (p20 to p80)": lambda r, o: spread(r),
        "against ours": _ratio,
        "megapixels/s": lambda r, o: _cell(r["axes"]["points"] / r["median_ms"] / 1e3 if "median_ms" in r else None),
        "peak MB": lambda r, o: _cell(r.get("peak_mb")),
    },
}
"""Of a suite's table: heading -> cell, from a row and ours of the same case."""

TITLES = {
    "layers": "Single layers, forward and backward",
    "step": "Training steps: forward, loss and backward",
    "fit": "One unseen scan, from a start to a PSNR",
    "dataset": "Whole data sets",
    "render": "Rendering a network of 5x256, three channels",
}
SUITES = tuple(TITLES)


def suite_table(suite: str, rows: Rows, only: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Headings and cells, the faster first in each case; slower ones of ours stand there like the others.

    Args:
        only: the table of a suite that has several ("sizes" of "step").
    """
    own = [r for r in rows if r["suite"] == suite and (only is None or r["table"] == only)]
    columns = COLUMNS[suite]
    cells = []
    for case in dict.fromkeys((r["case"], r["threads"]) for r in own):
        group = [r for r in own if (r["case"], r["threads"]) == case]
        ours = next((r for r in group if r["provider"] == OURS), None)
        cells += [
            [r["case"], named_provider(r), *(make(r, ours) for make in columns.values()), remark(r)]
            for r in sorted(group, key=lambda r: r.get("median_ms", float("inf")))
        ]
    headings = ["case", "provider", *columns, "remarks"]
    if all(not line[-1] for line in cells):
        headings, cells = headings[:-1], [line[:-1] for line in cells]
    return headings, cells


def where(document: dict[str, Any]) -> str:
    """One line: the machine, versions, the date."""
    m = document["machine"]
    quick = " Quick run: few rounds." if document["quick"] else ""
    gpu = f"{m['gpu']}, " if "gpu" in m else ""
    return (
        f"{gpu}{m['cpu']}, {m['cores']} cores, torch {m['torch']}, Python {m['python']}, commit {m['commit']}, "
        f"{m['date']}; {OURS} runs its {m['engine']} engine. Medians of interleaved rounds.{quick}"
    )


def markdown(document: dict[str, Any]) -> str:
    """All tables of a run."""
    parts = ["# strainer_fast benchmarks", where(document)]
    for suite in SUITES:
        headings, cells = suite_table(suite, document["rows"])
        if cells:
            parts += [f"## {TITLES[suite]}", table(headings, cells)]
    return "\n\n".join(parts) + "\n"

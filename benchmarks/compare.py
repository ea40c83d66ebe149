"""Two runs beside each other: what changed beyond noise."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strainer_fast.benchmarks.harness import OURS, Row
from strainer_fast.benchmarks.tables import number, table

KEY = ("suite", "case", "provider", "threads", "device")
LEAST = 0.03
"""Changes below this are noise whatever the rounds say."""
ENOUGH_PEERS = 3
"""Rows of peers that it takes to tell how much faster or slower the machine was."""


@dataclass(frozen=True)
class Change:
    """A row that both runs have.

    Args:
        ratio: time after over time before.
        corrected: the same, the machine's own change taken out.
        beyond_noise: whether p20 to p80 of the two, so corrected, do not touch and the medians differ by LEAST.
    """

    row: Row
    before_ms: float
    after_ms: float
    ratio: float
    corrected: float
    beyond_noise: bool


def drift(before: dict[Any, Row], after: dict[Any, Row], suite: str) -> float:
    """How much longer the peers took in the median, whose code is the same: the machine's doing, not ours."""
    ratios = [
        after[key]["median_ms"] / row["median_ms"]
        for key, row in before.items()
        if key in after and row["suite"] == suite and not row["provider"].startswith(OURS)
    ]
    return statistics.median(ratios) if len(ratios) >= ENOUGH_PEERS else 1.0


def changes(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Change], dict[str, float]]:
    """Every row that both have a time of, and each suite's drift."""

    def timed(rows: Sequence[Row]) -> dict[Any, Row]:
        return {tuple(r[k] for k in KEY): r for r in rows if "median_ms" in r}

    a, b = timed(before), timed(after)
    drifts = {suite: drift(a, b, suite) for suite in dict.fromkeys(r["suite"] for r in a.values())}
    found = []
    for key, old in a.items():
        if key not in b:
            continue
        new, scale = b[key], drifts[old["suite"]]
        corrected = new["median_ms"] / old["median_ms"] / scale
        apart = new["p20_ms"] / scale > old["p80_ms"] or new["p80_ms"] / scale < old["p20_ms"]
        found.append(
            Change(
                new,
                old["median_ms"],
                new["median_ms"],
                new["median_ms"] / old["median_ms"],
                corrected,
                apart and abs(corrected - 1) > LEAST,
            )
        )
    return found, drifts


def comparison(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, list[Change]]:
    """What changed beyond noise, also as Markdown, and what is only in one of them."""
    found, drifts = changes(before["rows"], after["rows"])
    lines = []
    for name in ("cpu", "gpu", "torch", "python", "strainer_fast", "commit", "date"):
        a, b = (d["machine"].get(name) for d in (before, after))
        if a != b:
            lines.append(f"{name}: {a} -> {b}")
    lines += [f"{suite}: the machine took {d:.2f} times as long, by its peers" for suite, d in drifts.items()]
    changed = sorted((c for c in found if c.beyond_noise), key=lambda c: -abs(c.corrected - 1))
    cells = [
        [
            *(c.row["suite"], c.row["case"], c.row["provider"]),
            *(number(c.before_ms), number(c.after_ms), f"{c.corrected:.2f}"),
            "slower" if c.corrected > 1 else "faster",
        ]
        for c in changed
    ]
    if cells:
        headings = ["suite", "case", "provider", "ms before", "ms after", "times as long, machine's change out", ""]
        lines.append("\n" + table(headings, cells))
    lines.append(f"\n{len(changed)} of {len(found)} rows changed beyond noise.")
    keys = [{tuple(r[k] for k in KEY) for r in d["rows"] if "median_ms" in r} for d in (before, after)]
    for only, name in ((keys[0] - keys[1], "first"), (keys[1] - keys[0], "second")):
        if only:
            lines.append(f"{len(only)} rows are only in the {name} file.")
    return "\n".join(lines), changed

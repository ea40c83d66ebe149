"""Two runs beside each other: what changed beyond noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from strainer_fast.benchmarks.harness import OURS, Row
from strainer_fast.benchmarks.tables import number, table

KEY = ("suite", "case", "provider", "threads", "device")
LEAST = 0.03
"""Changes below this are noise whatever the rows say."""
ENOUGH_PEERS, MANY_PEERS = 3, 10
"""Rows of peers that it takes to tell how much faster or slower the machine was, and how restless."""
QUIET = 0.95
"""Share of the peers' rows whose change is taken for noise, for their code is the same in both runs."""


@dataclass(frozen=True)
class Change:
    """A row that both runs have.

    Args:
        corrected: time after over time before, the machine's own change taken out.
        beyond_noise: whether p20 to p80 of the two, so corrected, do not touch, and the change is above the noise.
    """

    row: Row
    before_ms: float
    after_ms: float
    corrected: float
    beyond_noise: bool


@dataclass(frozen=True)
class Noise:
    """What a suite's peers, whose code is the same, say about the machine between two runs.

    Args:
        drift: how much longer they took, in the median.
        level: the change, as a logarithm, that 19 in 20 of their rows stay within; of all suites where they are few.
    """

    drift: float = 1.0
    level: float = math.log1p(LEAST)


def noise_of(ratios: Sequence[float], otherwise: float = 0.0) -> Noise:
    """From the peers' times after over before; `otherwise` is the level where they are few."""
    drift = statistics.median(ratios) if len(ratios) >= ENOUGH_PEERS else 1.0
    moved = sorted(abs(math.log(ratio / drift)) for ratio in ratios)
    level = moved[math.ceil(QUIET * len(moved)) - 1] if len(moved) >= MANY_PEERS else otherwise
    return Noise(drift, max(level, Noise.level))


def changes(before: Sequence[Row], after: Sequence[Row]) -> tuple[list[Change], dict[str, Noise]]:
    """Every row that both have a time of, and each suite's noise."""

    def timed(rows: Sequence[Row]) -> dict[Any, Row]:
        return {tuple(r[k] for k in KEY): r for r in rows if "median_ms" in r}

    a, b = timed(before), timed(after)
    pairs = [(old, b[key]) for key, old in a.items() if key in b]
    moved: dict[str, list[float]] = {old["suite"]: [] for old, _ in pairs}
    for old, new in pairs:
        if not old["provider"].startswith(OURS):
            moved[old["suite"]].append(new["median_ms"] / old["median_ms"])
    overall = noise_of([ratio for ratios in moved.values() for ratio in ratios]).level
    noises = {suite: noise_of(ratios, overall) for suite, ratios in moved.items()}
    found = []
    for old, new in pairs:
        noise = noises[old["suite"]]
        ratio = new["median_ms"] / old["median_ms"]
        corrected = ratio / noise.drift
        apart = new["p20_ms"] / noise.drift > old["p80_ms"] or new["p80_ms"] / noise.drift < old["p20_ms"]
        beyond = apart and abs(math.log(corrected)) > noise.level
        found.append(Change(new, old["median_ms"], new["median_ms"], corrected, beyond))
    return found, noises


def comparison(before: dict[str, Any], after: dict[str, Any]) -> tuple[str, list[Change]]:
    """What changed beyond noise, also as Markdown, and what is only in one of them."""
    found, noises = changes(before["rows"], after["rows"])
    lines = []
    for name in ("cpu", "gpu", "torch", "python", "strainer_fast", "commit", "date"):
        a, b = (d["machine"].get(name) for d in (before, after))
        if a != b:
            lines.append(f"{name}: {a} -> {b}")
    lines += [
        f"{suite}: by its peers the machine took {noise.drift:.2f} times as long; what is within a factor of "
        f"{math.exp(noise.level):.2f} is noise"
        for suite, noise in noises.items()
    ]
    changed = sorted((c for c in found if c.beyond_noise), key=lambda c: -abs(c.corrected - 1))
    cells = [
        [
            *(c.row["suite"], c.row["case"], c.row["provider"], str(c.row["threads"])),
            *(number(c.before_ms), number(c.after_ms), f"{c.corrected:.2f}"),
            "slower" if c.corrected > 1 else "faster",
        ]
        for c in changed
    ]
    if cells:
        headings = [
            "suite",
            "case",
            "provider",
            "threads",
            "ms before",
            "ms after",
            "times as long, machine's change out",
            "",
        ]
        lines.append("\n" + table(headings, cells))
    lines.append(f"\n{len(changed)} of {len(found)} rows changed beyond noise.")
    keys = [{tuple(r[k] for k in KEY) for r in d["rows"] if "median_ms" in r} for d in (before, after)]
    for only, name in ((keys[0] - keys[1], "first"), (keys[1] - keys[0], "second")):
        if only:
            lines.append(f"{len(only)} rows are only in the {name} file.")
    return "\n".join(lines), changed

"""What the host does in a step of each recipe: counts on the stand-in, of fits as users run them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import strainer_fast as sf
from tests.standin.counts import Counts, counted


@dataclass(frozen=True)
class Stepping:
    """A recipe whose steps are counted."""

    name: str
    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    encoder: bool = False
    signals: int = 1


RECIPES = (
    Stepping("Adam (paper)", "paper"),
    Stepping("Adam, looked at every step (small)", "small"),
    Stepping("K-FAC (fast)", "fast"),
    Stepping("K-FAC from an encoder (fast)", "fast", encoder=True),
    Stepping("Muon", "paper", {"optimiser": "muon"}),
    Stepping("sampled points", "paper", {"sampling": "random"}),
)

NAMES = ("operations", "launches", "synchronisations", "replays", "replayed")

NETWORK = sf.Architecture(hidden_features=80)
"""As deep as the paper's, and too wide to be fitted whole on chip; a width of 256 goes by layers inside its replays."""

BETWEEN = 2, 12
"""Steps of the two fits whose difference is counted: a whole period of K-FAC's refresh and of looks at the loss."""


def counts_of(stepping: Stepping, architecture: sf.Architecture = NETWORK, size: int = 12) -> dict[str, float]:
    """Counts per step, between two fits of different length: what a fit does once cancels out."""
    signals = sf.signals.samples("brain-mri", size=size)[: stepping.signals]
    init: Any = "siren"
    if stepping.encoder:
        init = sf.pretrain(signals, sf.recipe("paper", pretrain_steps=1), architecture=architecture, device="cpu")

    def fit(steps: int) -> Counts:
        recipe = sf.recipe(stepping.preset, steps=steps, **stepping.changes)
        with counted() as counts:
            own = None if stepping.encoder else architecture
            sf.fit(signals, init, recipe, architecture=own, device="cuda")
        return counts

    few, many = (fit(steps) for steps in BETWEEN)
    return {name: (many.total(name) - few.total(name)) / (BETWEEN[1] - BETWEEN[0]) for name in NAMES}


def row(name: str, counts: dict[str, float]) -> str:
    """A row of the table, in Markdown."""
    return f"| {name} | " + " | ".join(f"{counts[n]:.4g}" for n in NAMES) + " |"


HEAD = (
    "| step of | PyTorch operations | launches | synchronisations | graph replays | done by replays |\n"
    "|---|---|---|---|---|---|"
)

"""Recipes by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from strainer_fast._checks import check_choice
from strainer_fast.fitting.recipe import Recipe, with_changes

_FAST = Recipe(
    name="fast",
    steps=300,
    start="least_squares",
    weight_scale=2.0,
    freeze="stable_rank",
    optimiser="kfac",
    learning_rate=0.03,
    damping=0.1,
    pretrain_steps=1000,
    pretrain_weight_scale=2.0,
    pretrain_optimiser="muon",
    pretrain_learning_rate=4e-3,
    pretrain_schedule="cosine",
    pretrain_warmup_steps=5,
    check_every=1,
)

PRESETS = {
    "paper": Recipe(),
    "fast": _FAST,
    "quality": replace(_FAST, name="quality", freeze=0, until_exact=True),
    "prior": Recipe(name="prior", steps=300, start="least_squares", check_every=1),
    "small": Recipe(
        name="small",
        steps=500,
        start="least_squares",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=5,
        check_every=1,
    ),
}

PURPOSES = {
    "paper": "STRAINER to the letter (arXiv 2409.09566): what others are compared with",
    "fast": "fewest seconds to a PSNR; the default",
    "quality": "best PSNR in a budget of steps, until 8-bit data come back exactly",
    "prior": "best for inverse problems and for pixels between the ones that were fitted",
    "small": "the best that the native engine runs as whole fits of small networks",
}

REASONS: dict[str, dict[str, tuple[str, str]]] = {}
"""preset -> field -> (why it has this value, the row of benchmarks/results/psnr-search.jsonl that shows it)."""


def recipe(base: str | Recipe = "fast", **changes: Any) -> Recipe:
    """A preset by name (or a recipe) with some fields replaced: recipe("paper", steps=500).

    Raises InputError for an unknown preset, field or value.
    """
    if isinstance(base, str):
        check_choice("recipe", base, tuple(PRESETS), "These are the presets.")
        base = PRESETS[base]
    return with_changes(base, changes)

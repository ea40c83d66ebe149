"""Recipes by name."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from strainer_fast._checks import bad_input, bad_type, check_choice
from strainer_fast.fitting.recipe import Recipe

_FAST = Recipe(
    name="fast",
    steps=300,
    start="least_squares",
    weight_scale="auto",
    freeze="stable_rank",
    optimiser="kfac",
    learning_rate=0.03,
    damping=0.1,
    pretrain_steps=1000,
    pretrain_weight_scale="auto",
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
    "prior": "best between the samples that were fitted and for inverse problems; for pre-training too",
    "small": "the best that the native engine runs as whole fits of small networks",
}

_FAST_REASONS = {
    "steps": ("a cap that fits to 50 dB stay far below", "optimiser: K-FAC"),
    "start": ("K-FAC does not get going from a random head", "optimiser: K-FAC, random head"),
    "weight_scale": (
        "of networks without an encoder: at 1 they stall, at 2 coarse grids run wild",
        "no encoder, weights x 2, K-FAC",
    ),
    "freeze": (
        "steps of less than half the time; on another head more of them, and still sooner",
        "freeze: stable_rank",
    ),
    "optimiser": ("a fraction of Adam's steps from the same start", "optimiser: K-FAC"),
    "learning_rate": ("half and twice of it are no better", "optimiser: K-FAC, learning rate 0.06"),
    "pretrain_steps": ("enough at 178x178; at 96x96 a tenth of it does", "encoder: Muon, 600 steps"),
    "pretrain_weight_scale": ("keeps the last decibels fast, which trained weights lose", "encoder: Muon, weights x 2"),
    "pretrain_optimiser": ("fits its images in a fraction of Adam's steps", "encoder: Adam, 600 steps"),
    "pretrain_learning_rate": ("the longest step that does not roughen the encoder", "encoder: Muon 8e-3"),
    "pretrain_schedule": ("steps of one length end the encoder far from its images", "encoder: Muon, constant rate"),
    "pretrain_warmup_steps": ("for larger networks; here it makes little difference", "encoder: Muon, no warm-up"),
    "check_every": ("a step gains decibels: looking later would waste some", "optimiser: K-FAC"),
}

REASONS: dict[str, dict[str, tuple[str, str]]] = {
    "fast": _FAST_REASONS,
    "quality": {field: why for field, why in _FAST_REASONS.items() if field != "freeze"}
    | {"until_exact": ("nothing is left to gain once every 8-bit value is right", "")},
    "prior": {
        "steps": ("priors are read early: stop by hand, or by a target", ""),
        "start": ("denoises as well as a random head, in fewer steps", "start: least_squares"),
        "check_every": ("so that a target stops it in time", ""),
    },
    "small": {
        "steps": ("what the schedule ends with; a target comes long before", ""),
        "start": ("two thirds of a random head's steps", "small: no encoder, least_squares, Adam 0.001"),
        "learning_rate": ("the soonest at 35 and 40 dB from an encoder", "small: encoder, least_squares, Adam 0.001"),
        "schedule": ("as soon there, and no spikes at the end", "small: encoder, least_squares, Adam 0.001, cosine"),
        "warmup_steps": ("the same rows", "small: encoder, least_squares, Adam 0.001, cosine"),
        "check_every": ("whole fits look at every step for nothing", ""),
    },
}
"""preset -> field -> (why it has this value, the row of benchmarks/results/psnr-*.jsonl that shows it)."""


def recipe(base: str | Recipe = "fast", /, **changes: Any) -> Recipe:
    """A preset by name (or a recipe) with some fields replaced: recipe("paper", steps=500).

    Raises InputError for an unknown preset, field or value.
    """
    if isinstance(base, str):
        check_choice("recipe", base, tuple(PRESETS), "These are the presets.")
        base = PRESETS[base]
    if not isinstance(base, Recipe):
        raise bad_type("recipe", "a Recipe or the name of a preset", base, f"Presets: {', '.join(PRESETS)}.")
    known = {field.name for field in fields(Recipe)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise bad_input("recipe", f"fields {', '.join(sorted(known))}", ", ".join(unknown), "Check the spelling.")
    return replace(base, **changes)

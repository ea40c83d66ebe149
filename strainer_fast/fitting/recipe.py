"""How a fit is run, as frozen data; presets by name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from strainer_fast._checks import bad_input, check_choice, check_count, check_real
from strainer_fast.ops.dispatch import PRECISIONS

STARTS = ("random", "least_squares", "mean")


@dataclass(frozen=True)
class Recipe:
    """How networks are optimised. The fields' defaults are the preset `paper`.

    Full batch, Adam with a constant learning rate, every parameter trained, targets in [0, 1]; the loss is the sum
    over signals of each signal's mean squared error (arXiv 2409.09566, section 4).

    Args:
        name: label in results.
        steps: optimiser steps of a fit, at most.
        pretrain_steps: optimiser steps of pre-training.
        start: the decoder a fit starts from: "random" (the paper's), "least_squares" (closed form on the frozen
            features of a trained encoder) or "mean" (of the pre-training decoders).
        ridge: weight penalty of the least-squares start, relative to the mean variance of the features.
        learning_rate, betas, eps: Adam's.
        target_psnr: stop a signal of a fit once it reaches this many dB; None runs all steps.
        guard_db: of fits: roll a network back to its best weights, once and with half the learning rate, when its PSNR
            at a look falls this many dB below its best or its loss is not finite; the second time it stops there
            ("diverged"). None: no roll-back, a fit whose loss is not finite stops at its last finite weights.
        precision: what operands of products are rounded to, sums being float32: "fp32", or on a GPU "tf32", "fp16",
            "bf16"; "auto" is fp16 with the Triton kernels on a GPU, where it is as good (gradients are scaled inside),
            else fp32.
        check_every: steps between two looks at the loss; a fit can only stop at one of them.
        seed: of pre-training's initial weights. A fit draws a signal's from the seed and the signal's values, so they
            depend neither on its company nor on its place.

    Raises InputError for a value out of range.
    """

    name: str = "paper"
    steps: int = 2000
    pretrain_steps: int = 5000
    start: str = "random"
    ridge: float = 1e-4
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    target_psnr: float | None = None
    guard_db: float | None = None
    precision: str = "auto"
    check_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        betas = self.betas
        if not isinstance(betas, Sequence) or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise bad_input("betas", "two numbers in [0, 1)", betas, "Adam's defaults are (0.9, 0.999).")
        checked = {
            "steps": check_count("steps", self.steps, 0),
            "pretrain_steps": check_count("pretrain_steps", self.pretrain_steps, 0),
            "start": check_choice("start", self.start, STARTS),
            "ridge": check_real("ridge", self.ridge, minimum=0),
            "learning_rate": check_real("learning_rate", self.learning_rate, above=0),
            "betas": (float(betas[0]), float(betas[1])),
            "eps": check_real("eps", self.eps, minimum=0),
            "target_psnr": None if self.target_psnr is None else check_real("target_psnr", self.target_psnr, above=0),
            "guard_db": None if self.guard_db is None else check_real("guard_db", self.guard_db, above=0),
            "precision": check_choice("precision", self.precision, ("auto", *PRECISIONS)),
            "check_every": check_count("check_every", self.check_every),
            "seed": check_count("seed", self.seed, 0, 2**62),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `Recipe(**data)` brings it back."""
        return asdict(self) | {"betas": list(self.betas)}


PRESETS = {"paper": Recipe()}


def recipe(base: str | Recipe = "paper", **changes: Any) -> Recipe:
    """A preset by name (or a recipe) with some fields replaced: recipe("paper", steps=500).

    Raises InputError for an unknown preset, field or value.
    """
    if isinstance(base, str):
        check_choice("recipe", base, tuple(PRESETS), "These are the presets.")
        base = PRESETS[base]
    known = {field.name for field in fields(Recipe)}
    unknown = sorted(set(changes) - known)
    if unknown:
        raise bad_input("recipe", f"fields {', '.join(sorted(known))}", ", ".join(unknown), "Check the spelling.")
    return replace(base, **changes)

"""How a fit is run, as frozen data; the presets and why they are so: presets.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Real
from typing import Any

from strainer_fast._checks import bad_input, check_choice, check_count, check_real
from strainer_fast.ops.dispatch import PRECISIONS

STARTS = ("random", "least_squares", "mean")
OPTIMISERS = ("adam", "muon", "kfac")
SCHEDULES = ("constant", "cosine", "plateau")
SAMPLINGS = ("full", "random", "lattice", "error")
PRETRAINING = ("strainer", "maml", "reptile")
STABLE_RANK = "stable_rank"
AUTO = "auto"


@dataclass(frozen=True)
class Recipe:
    """How networks are optimised. The fields' defaults are the preset `paper`.

    Full batch, Adam with a constant learning rate, every parameter trained, targets in [0, 1]; the loss is the sum
    over signals of each signal's mean squared error (arXiv 2409.09566, section 4).

    Args:
        name: label in results.
        steps: optimiser steps of a fit, at most.
        start: the decoder a fit starts from: "random" (the paper's), "least_squares" (closed form on the features as
            they are; see weight_scale for networks that were not trained) or "mean" (of the pre-training decoders).
        ridge: weight penalty of the least-squares start, relative to the mean variance of the features.
        weight_scale: what the hidden layers' weights of a network without an encoder are multiplied by
            (arXiv 2410.04779); 1 is SIREN's initialisation, "auto" grows with the samples per axis n as
            2 (n / 178)^0.36, within 1 and 3: finer grids need higher frequencies, on coarser ones the same weights
            would run wild between the samples.
        freeze: of fits from an encoder (ignored without one): how many of its first sine layers stay as they are, or
            "stable_rank": all up to the one of highest ||W||_F^2 / ||W||_2^2 (arXiv 2605.08298), but not the last.
            Their features are computed once.
        optimiser: of fits, as are the fields up to `batch_points`: "adam"; "muon" (orthogonalised momentum for hidden
            matrices, Adam at half the learning rate for the rest); "kfac" (Kronecker-factored Gauss-Newton steps; a
            step that raises the loss is taken back).
        learning_rate: of the optimiser; of "kfac" the share of a Gauss-Newton step, which then adapts.
        betas, eps: Adam's.
        momentum: of "muon" (Nesterov's; None is 0.95) and "kfac" (None follows the share of the loss that a step
            leaves, within 0.5 and 0.95).
        damping: of "kfac": squared share of each factor's mean eigenvalue that is added to it.
        refresh_every: steps between two looks of "kfac" at the curvature.
        schedule: the learning rate over a fit: "constant"; "cosine" to a fiftieth at the last of `steps`, after
            `warmup_steps`; "plateau", halved whenever PSNR has gained less than 0.1 dB in 5 looks, which needs no
            budget.
        warmup_steps: steps over which the learning rate grows linearly to its value.
        sampling: of fits: points a step sees: "full"; or `batch_points` of them, drawn anew each step: "random",
            "lattice" (one from each cell of a regular partition) or "error" (half uniformly, half by the error last
            seen). PSNR is measured on all points, at every look. Signals then run one by one.
        batch_points: points of a step in the beginning, a share of all in (0, 1]; it doubles at each 10 dB above
            20 dB until it is all.
        pretrain_method: "strainer" (shared encoder, a decoder per signal), or meta-learning of a whole network: "maml"
            (second order; arXiv 1703.03400) or "reptile" (arXiv 1803.02999), with `inner_steps` of SGD at
            `inner_learning_rate` on each of `meta_batch` signals, and `pretrain_learning_rate` outside.
        pretrain_steps: optimiser steps of pre-training.
        pretrain_weight_scale, pretrain_optimiser, pretrain_learning_rate, pretrain_schedule, pretrain_warmup_steps: as
            above, of pre-training.
        target_psnr: stop a signal of a fit once it reaches this many dB; None runs all steps.
        until_exact: stop a signal of a fit once its values, rounded to 8 bits, equal the signal's (so rounded too,
            where it has more).
        guard_db: of fits: roll a network back to its best weights, once and with half the learning rate, when its PSNR
            at a look falls this many dB below its best or its loss is not finite; the second time it stops there
            ("diverged"). None: no roll-back, a fit whose loss is not finite stops at its last finite weights.
        precision: what operands of products are rounded to, sums being float32: "fp32", or on a GPU "tf32x3" (three
            products of tf32 for one: float32 but for 2^-21), "tf32", "fp16", "bf16"; "auto" is fp16 with the
            Triton kernels on a GPU where steps see all points: as good until its rounding shows (gradients are scaled
            inside), and fp32 elsewhere.
        check_every: steps between two looks at the loss; a fit can only stop at one of them.
        seed: of pre-training's initial weights. A fit draws a signal's from the seed and the signal's values, so they
            depend neither on its company nor on its place.

    Raises InputError for a value out of range.
    """

    name: str = "paper"
    steps: int = 2000
    start: str = "random"
    ridge: float = 1e-4
    weight_scale: float | str = 1.0
    freeze: int | str = 0
    optimiser: str = "adam"
    learning_rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float | None = None
    damping: float = 0.1
    refresh_every: int = 10
    schedule: str = "constant"
    warmup_steps: int = 0
    sampling: str = "full"
    batch_points: float = 0.25
    pretrain_method: str = "strainer"
    pretrain_steps: int = 5000
    pretrain_weight_scale: float | str = 1.0
    pretrain_optimiser: str = "adam"
    pretrain_learning_rate: float = 1e-4
    pretrain_schedule: str = "constant"
    pretrain_warmup_steps: int = 0
    inner_steps: int = 2
    inner_learning_rate: float = 1e-2
    meta_batch: int = 3
    target_psnr: float | None = None
    until_exact: bool = False
    guard_db: float | None = None
    precision: str = "auto"
    check_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        betas = self.betas
        numbers = isinstance(betas, Sequence) and all(isinstance(beta, Real) for beta in betas)
        if not numbers or len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise bad_input("betas", "two numbers in [0, 1)", betas, "Adam's defaults are (0.9, 0.999).")
        if isinstance(self.freeze, str) and self.freeze != STABLE_RANK:
            raise bad_input(
                "freeze", f"a number of layers or {STABLE_RANK!r}", repr(self.freeze), "Check the spelling."
            )
        momentum = None if self.momentum is None else check_real("momentum", self.momentum, minimum=0)
        if momentum is not None and momentum >= 1:
            raise bad_input("momentum", "a number in [0, 1)", momentum, "For example 0.5.")
        share = check_real("batch_points", self.batch_points, above=0)
        if share > 1:
            raise bad_input("batch_points", "a share of all points in (0, 1]", share, "For example 0.25.")
        if not isinstance(self.until_exact, bool):
            raise bad_input("until_exact", "True or False", repr(self.until_exact), "Choose one.")
        checked = {
            "steps": check_count("steps", self.steps, 0),
            "start": check_choice("start", self.start, STARTS),
            "ridge": check_real("ridge", self.ridge, minimum=0),
            "weight_scale": _check_scale("weight_scale", self.weight_scale),
            "freeze": self.freeze if self.freeze == STABLE_RANK else check_count("freeze", self.freeze, 0),
            "optimiser": check_choice("optimiser", self.optimiser, OPTIMISERS),
            "learning_rate": check_real("learning_rate", self.learning_rate, above=0),
            "betas": (float(betas[0]), float(betas[1])),
            "eps": check_real("eps", self.eps, minimum=0),
            "momentum": momentum,
            "damping": check_real("damping", self.damping, above=0),
            "refresh_every": check_count("refresh_every", self.refresh_every),
            "schedule": check_choice("schedule", self.schedule, SCHEDULES),
            "warmup_steps": check_count("warmup_steps", self.warmup_steps, 0),
            "sampling": check_choice("sampling", self.sampling, SAMPLINGS),
            "batch_points": share,
            "pretrain_method": check_choice("pretrain_method", self.pretrain_method, PRETRAINING),
            "pretrain_steps": check_count("pretrain_steps", self.pretrain_steps, 0),
            "pretrain_weight_scale": _check_scale("pretrain_weight_scale", self.pretrain_weight_scale),
            "pretrain_optimiser": check_choice("pretrain_optimiser", self.pretrain_optimiser, OPTIMISERS),
            "pretrain_learning_rate": check_real("pretrain_learning_rate", self.pretrain_learning_rate, above=0),
            "pretrain_schedule": check_choice("pretrain_schedule", self.pretrain_schedule, SCHEDULES),
            "pretrain_warmup_steps": check_count("pretrain_warmup_steps", self.pretrain_warmup_steps, 0),
            "inner_steps": check_count("inner_steps", self.inner_steps),
            "inner_learning_rate": check_real("inner_learning_rate", self.inner_learning_rate, above=0),
            "meta_batch": check_count("meta_batch", self.meta_batch),
            "target_psnr": None if self.target_psnr is None else check_real("target_psnr", self.target_psnr, above=0),
            "guard_db": None if self.guard_db is None else check_real("guard_db", self.guard_db, above=0),
            "precision": check_choice("precision", self.precision, ("auto", *PRECISIONS)),
            "check_every": check_count("check_every", self.check_every),
            "seed": check_count("seed", self.seed, 0, 2**62),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)
        if self.optimiser == "kfac" and self.sampling != "full":
            raise bad_input(
                "sampling",
                "'full' with optimiser 'kfac', which compares each loss with the one before",
                repr(self.sampling),
                "Use 'adam' or 'muon' with it.",
            )
        if self.pretrain_method != "strainer" and self.pretrain_optimiser == "kfac":
            fix = "Use 'adam' or 'muon'."
            raise bad_input("pretrain_optimiser", "one that takes any gradient, for meta-learning", "'kfac'", fix)
        if self.pretrain_schedule == "plateau":
            fix = "Pre-training has a budget."
            raise bad_input("pretrain_schedule", "'constant' or 'cosine'", "'plateau'", fix)

    def of_pretraining(self) -> Recipe:
        """The same with what belongs to pre-training in the place of what belongs to fits."""
        return replace(
            self,
            steps=self.pretrain_steps,
            weight_scale=self.pretrain_weight_scale,
            optimiser=self.pretrain_optimiser,
            learning_rate=self.pretrain_learning_rate,
            schedule=self.pretrain_schedule,
            warmup_steps=self.pretrain_warmup_steps,
            sampling="full",
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `Recipe(**data)` brings it back."""
        return asdict(self) | {"betas": list(self.betas)}


def _check_scale(what: str, value: object) -> float | str:
    if isinstance(value, str) and value != AUTO:
        raise bad_input(what, f"a number above 0 or {AUTO!r}", repr(value), "Check the spelling.")
    return AUTO if value == AUTO else check_real(what, value, above=0)

"""The methods, as data: how an encoder comes to be, and how a fit runs from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import strainer_fast as sf


@dataclass(frozen=True)
class Source:
    """How an encoder comes to be.

    Args:
        name: of its file.
        recipe: preset and changed fields.
        images: how many of the domain's; None is all.
        noise: kind of noise signals to train on, ten of them, instead of images or, with `images`, beside them.
        amplitude: of the noise.
        size: of the training signals; None is that of the fits.
        steps: by domain; "*" is the rest.
    """

    name: str
    recipe: str = "paper"
    changes: dict[str, Any] = field(default_factory=dict)
    images: int | None = None
    noise: str | None = None
    amplitude: float = 1.0
    size: int | None = None
    steps: dict[str, int] = field(default_factory=lambda: {"*": 1000})

    def steps_on(self, domain: str) -> int:
        """Optimiser steps of pre-training."""
        return self.steps.get(domain, self.steps["*"])


@dataclass(frozen=True)
class Method:
    """A row of a table: `source` None starts from a random SIREN; `steps` is a budget of its own, for schedules."""

    name: str
    recipe: str = "paper"
    changes: dict[str, Any] = field(default_factory=dict)
    source: Source | None = None
    note: str = ""
    steps: int | None = None

    def fit_recipe(self, **more: Any) -> sf.Recipe:
        """The recipe of its fits."""
        recipe = sf.recipe(self.recipe, **{"check_every": 1} | self.changes | more)
        return recipe if self.steps is None else sf.recipe(recipe, steps=min(recipe.steps, self.steps))


FULL = {"brain-mri": 5000, "*": 1000}
PAPER_10 = Source("strainer-10", steps=FULL)
PAPER_1 = Source("strainer-1", images=1, steps=FULL)
NOISE = Source("noise-uniform", noise="uniform", images=0, steps={"*": 5000})
MAML = Source("maml", changes={"pretrain_method": "maml", "pretrain_learning_rate": 1e-4}, size=96, steps={"*": 50})
FAST = Source("fast", recipe="fast", steps={"*": sf.recipe("fast").pretrain_steps})

TUNED = {"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 5}
"""Of a plain SIREN; best of the grid in SIREN_GRID."""
MUON = {"optimiser": "muon", "learning_rate": 3e-3, "schedule": "cosine", "warmup_steps": 5}
"""The same with Muon."""

REPORTED = (
    Method("SIREN, paper"),
    Method("SIREN, tuned", changes=TUNED, note="best of a grid over learning rate and schedule"),
    Method("SIREN, tuned, over 100 steps", changes=TUNED, note="the same, as it was tuned", steps=100),
    Method("SIREN + Muon", changes=MUON),
    Method("SIREN + Muon, over 100 steps", changes=MUON, steps=100),
    Method("SIREN, weights x 2.5", changes={"weight_scale": 2.5}, note="no pre-training"),
    Method("STRAINER-1, paper", source=PAPER_1),
    Method("STRAINER-10, paper", source=PAPER_10),
    Method("Meta-learned (MAML)", changes={"start": "mean"}, source=MAML),
    Method("Noise-pretrained", source=NOISE, note="ten images of uniform noise"),
    Method("fast", recipe="fast", source=FAST),
    Method("fast, every layer trained", recipe="fast", changes={"freeze": 0}, source=FAST, note="as `quality`"),
    Method("fast without an encoder", recipe="fast"),
)


def _search() -> Iterator[Method]:
    """Leads, one change at a time from the recipe in use when they were tried."""
    adam = Source("adam-600", steps={"*": 600})
    muon = {"pretrain_optimiser": "muon", "pretrain_schedule": "cosine", "pretrain_warmup_steps": 5}
    ours = Source("muon-300", changes=muon | {"pretrain_learning_rate": 4e-3}, steps={"*": 300})
    kfac = {"optimiser": "kfac", "learning_rate": 0.03, "damping": 0.1, "momentum": 0.5, "start": "least_squares"}

    for start in ("random", "least_squares", "mean"):
        yield Method(f"start: {start}", changes={"start": start}, source=adam)
    for ridge in (1e-6, 1e-2):
        yield Method(f"start: least_squares, ridge {ridge:g}", changes=kfac | {"ridge": ridge}, source=ours)
    yield Method("encoder: Muon, fit: Adam 1e-4", changes={"start": "least_squares"}, source=ours)
    optimisers: dict[str, dict[str, Any]] = {
        "Adam 3e-4, cosine": {"learning_rate": 3e-4, "schedule": "cosine"},
        "Adam 1e-4, plateau": {"schedule": "plateau"},
        "Muon 3e-4, cosine": {"optimiser": "muon", "learning_rate": 3e-4, "schedule": "cosine"},
        "K-FAC": kfac,
        "K-FAC, learning rate 0.06": kfac | {"learning_rate": 0.06},
        "K-FAC, learning rate 0.015": kfac | {"learning_rate": 0.015},
        "K-FAC, damping 0.03": kfac | {"damping": 0.03},
        "K-FAC, damping 0.3": kfac | {"damping": 0.3},
        "K-FAC, momentum by progress": kfac | {"momentum": None},
        "K-FAC, momentum 0": kfac | {"momentum": 0.0},
        "K-FAC, momentum 0.8": kfac | {"momentum": 0.8},
        "K-FAC, refreshed every step": kfac | {"refresh_every": 1},
        "K-FAC, refreshed every 5": kfac | {"refresh_every": 5},
        "K-FAC, random head": kfac | {"start": "random"},
    }
    for name, changes in optimisers.items():
        yield Method(f"optimiser: {name}", changes={"start": "least_squares"} | changes, source=ours)
    for freeze in (1, 2, 3, 4, "stable_rank"):
        yield Method(f"freeze: {freeze}", changes=kfac | {"freeze": freeze}, source=ours)
    for sampling in ("random", "lattice", "error"):
        changes = {"start": "least_squares", "sampling": sampling}
        yield Method(f"sampling: {sampling}, Adam 1e-4", changes=changes, source=ours)
    for name, source in {
        "Adam, 600 steps": adam,
        "Muon 2e-3": Source("muon-2e-3", changes=muon | {"pretrain_learning_rate": 2e-3}, steps={"*": 300}),
        "Muon 8e-3": Source("muon-8e-3", changes=muon | {"pretrain_learning_rate": 8e-3}, steps={"*": 300}),
        "Muon, 100 steps": Source("muon-100", changes=ours.changes, steps={"*": 100}),
        "Muon, 600 steps": Source("muon-600", changes=ours.changes, steps={"*": 600}),
        "Muon, weights x 1.5": Source(
            "muon-x1.5", changes=ours.changes | {"pretrain_weight_scale": 1.5}, steps={"*": 300}
        ),
        "Muon, weights x 2": Source("muon-x2", changes=ours.changes | {"pretrain_weight_scale": 2.0}, steps={"*": 300}),
        "Muon, constant rate": Source(
            "muon-constant", changes=ours.changes | {"pretrain_schedule": "constant"}, steps={"*": 300}
        ),
        "Muon, no warm-up": Source("muon-cold", changes=ours.changes | {"pretrain_warmup_steps": 0}, steps={"*": 300}),
        "Muon on 3 images": Source("muon-3", changes=ours.changes, images=3, steps={"*": 300}),
        **{
            f"Muon on noise, {kind}": Source(
                f"muon-{kind}", changes=ours.changes, images=0, noise=kind, steps={"*": 300}
            )
            for kind in ("uniform", "gaussian", "spectrum", "dead-leaves")
        },
        "Muon on images and noise": Source(
            "muon-mixture", changes=ours.changes, noise="uniform", amplitude=0.3, steps={"*": 300}
        ),
    }.items():
        yield Method(f"encoder: {name}", changes=kfac, source=source)
    meta = {"pretrain_learning_rate": 1e-4}
    for method in ("maml", "reptile"):
        source = Source(method, changes=meta | {"pretrain_method": method}, steps={"*": 100})
        yield Method(f"encoder: {method}, Adam 1e-4", changes={"start": "mean"}, source=source)
        yield Method(f"encoder: {method}, K-FAC", changes=kfac, source=source)
    for scale in (1.0, 1.5, 2.0, 2.5, 3.0):
        yield Method(f"no encoder, weights x {scale:g}, K-FAC", changes=kfac | {"weight_scale": scale})
    yield Method(
        "no encoder, weights x 2, K-FAC, momentum by progress", changes=kfac | {"weight_scale": 2.0, "momentum": None}
    )
    yield Method("no encoder, weights x 2, K-FAC, random head", changes=kfac | {"weight_scale": 2.0, "start": "random"})
    yield Method("no encoder, weights x 2.5, Adam 1e-4", changes={"weight_scale": 2.5})


SEARCHED = tuple(_search())

SIREN_GRID = tuple(
    Method(f"SIREN grid: {optimiser} {rate:g}, {schedule}", changes=changes)
    for optimiser, rates in (("adam", (1e-4, 3e-4, 1e-3, 2e-3, 4e-3)), ("muon", (1e-3, 3e-3, 1e-2)))
    for rate in rates
    for schedule in ("constant", "cosine")
    for changes in [{"optimiser": optimiser, "learning_rate": rate, "schedule": schedule, "warmup_steps": 5}]
)
"""What the tuned baselines are chosen from, on the images of the search."""


def _small() -> Iterator[Method]:
    """What whole fits on the native engine can do, and `fast` beside it, for a network of three layers 32 wide."""
    muon = {"pretrain_optimiser": "muon", "pretrain_learning_rate": 4e-3, "pretrain_schedule": "cosine"}
    trained = Source("small", changes=muon, steps={"*": 300})
    for rate in (1e-3, 2e-3, 4e-3):
        for source, start in ((None, "random"), (None, "least_squares"), (trained, "least_squares")):
            what = f"{'encoder' if source else 'no encoder'}, {start}, Adam {rate:g}"
            yield Method(f"small: {what}", changes={"learning_rate": rate, "start": start}, source=source)
        scaled = {"learning_rate": rate, "start": "least_squares", "weight_scale": 2.0}
        yield Method(f"small: no encoder, weights x 2, least_squares, Adam {rate:g}", changes=scaled)
        cosine = {"learning_rate": rate, "start": "least_squares", "schedule": "cosine", "warmup_steps": 5}
        yield Method(f"small: encoder, least_squares, Adam {rate:g}, cosine", changes=cosine, source=trained)
    yield Method("small: no encoder, fast", recipe="fast")
    yield Method("small: encoder, fast", recipe="fast", changes={"freeze": 0}, source=trained)


SMALL = tuple(_small())


def _priors() -> Iterator[Method]:
    """Starts and optimisers that a noisy image is fitted with."""
    by_name = {m.name: m for m in SEARCHED}
    yield Method("SIREN, Adam 1e-4")
    yield by_name["start: random"]
    yield by_name["start: least_squares"]
    yield by_name["encoder: Muon, fit: Adam 1e-4"]
    yield by_name["optimiser: K-FAC"]
    yield by_name["freeze: 3"]
    adam = by_name["start: random"].source
    yield Method("encoder: Adam, fit: K-FAC", changes=by_name["optimiser: K-FAC"].changes, source=adam)
    yield Method("encoder: Muon on noise, uniform, Adam 1e-4", source=by_name["encoder: Muon on noise, uniform"].source)


PRIORS = tuple(_priors())

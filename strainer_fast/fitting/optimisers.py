"""The optimisers by the name a recipe has for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from strainer_fast.fitting.kfac import Kfac
from strainer_fast.fitting.muon import Muon
from strainer_fast.fitting.optim import Adam, Optimiser
from strainer_fast.fitting.recipe import Recipe


def make_optimiser(
    parameters: Sequence[Tensor],
    recipe: Recipe,
    num_signals: int | None,
    points: Tensor,
    omegas: Sequence[float],
    num_frozen: int = 0,
) -> Optimiser:
    """What `recipe.optimiser` names, with a fresh state; arguments as of Optimiser, Kfac and Muon."""
    if recipe.optimiser == "kfac":
        return Kfac(parameters, recipe, num_signals, points, omegas)
    if recipe.optimiser == "muon":
        return Muon(parameters, recipe, num_signals, num_frozen)
    return Adam(parameters, recipe, num_signals)

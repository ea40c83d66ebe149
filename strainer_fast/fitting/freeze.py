"""Freezing the first layers of an encoder: their features are the same for every signal on a grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from strainer_fast import reference
from strainer_fast._checks import bad_input
from strainer_fast.fitting.engine import CHUNK
from strainer_fast.fitting.recipe import STABLE_RANK
from strainer_fast.models import Architecture, Encoder
from strainer_fast.nn import SineLinear


def stable_rank(weight: Tensor) -> float:  # [out, in]
    """||W||_F^2 / ||W||_2^2: how many directions a matrix uses evenly."""
    singular = torch.linalg.svdvals(weight.detach().double())
    return float((singular**2).sum() / singular[0] ** 2)


def depth_of(freeze: int | str, init: Encoder | Architecture) -> int:
    """How many sine layers a recipe's `freeze` keeps as they are; none of networks without an encoder.

    Raises InputError for more layers than the encoder has.
    """
    if freeze == 0 or not isinstance(init, Encoder):
        return 0
    layers = [cast(SineLinear, layer) for layer in init.layers]
    if freeze == STABLE_RANK:
        ranks = [stable_rank(layer.weight) for layer in layers]
        highest = 1 + max(range(len(ranks)), key=ranks.__getitem__)
        return min(highest, len(layers) - 1)  # heads alone would have nothing left to learn after least squares
    if int(freeze) > len(layers):
        raise bad_input("freeze", f"at most the encoder's {len(layers)} layers", freeze, "Freeze fewer.")
    return int(freeze)


class FrozenFeatures:
    """Features of the first layers of an encoder on grids, kept for the grid that was last asked for.

    Args:
        encoder: whose layers; None freezes nothing.
        depth: how many.
    """

    def __init__(self, encoder: Encoder | None, depth: int) -> None:
        self.layers = [cast(SineLinear, layer) for layer in encoder.layers][:depth] if encoder else []
        self._last: tuple[tuple[int, ...], Tensor] | None = None

    @torch.no_grad()
    def of(self, shape: Sequence[int], points: Tensor) -> Tensor:  # [P, in] -> [P, H], or the points themselves
        """Features of the points of a grid of `shape`."""
        if not self.layers:
            return points
        if self._last is None or self._last[0] != tuple(shape) or self._last[1].device != points.device:
            last = points.new_empty(len(points), self.layers[-1].weight.shape[0])
            # Copies: the encoder is the caller's and stays where it is.
            copies = [[p.detach().to(points.device) for p in layer.parameters()] for layer in self.layers]
            for start in range(0, len(points), CHUNK):
                block = points[start : start + CHUNK]
                for (weight, bias), layer in zip(copies, self.layers, strict=True):
                    block = reference.sine_linear(block, weight, bias, layer.omega)
                last[start : start + CHUNK] = block
            self._last = (tuple(shape), last)
        return self._last[1]

"""Which points a step sees. PSNR is always measured on all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from strainer_fast._random import generator_at
from strainer_fast.fitting.recipe import Recipe

GROW_FROM_DB, GROW_EVERY_DB = 20.0, 10.0
"""The share of points doubles at every GROW_EVERY_DB above GROW_FROM_DB."""


def share(recipe: Recipe, psnr: float) -> float:
    """Which part of the points a step takes once the fit stands at `psnr` dB."""
    if not psnr > GROW_FROM_DB:
        return recipe.batch_points
    doublings = math.floor(min(psnr - GROW_FROM_DB, 1000.0) / GROW_EVERY_DB)
    return min(1.0, recipe.batch_points * 2.0**doublings)


class Sampler:
    """Draws the points of each step; the same ones for the same seed and step.

    Args:
        recipe: sampling, batch_points and seed count.
        shape: samples per axis of the grid, whose points are in row-major order.
        device: of the indices.
    """

    def __init__(self, recipe: Recipe, shape: Sequence[int], device: torch.device) -> None:
        self.recipe, self.shape, self.device = recipe, tuple(shape), device
        self.number = math.prod(self.shape)
        self.share = share(recipe, -math.inf)
        self.errors: Tensor | None = None  # [P] float64, running sums of the squared errors last measured

    def draw(self, step: int) -> Tensor | None:  # [batch] int64
        """Indices of the points of a step; None for all."""
        if self.share >= 1:
            return None
        generator = generator_at(self.recipe.seed, step)
        count = max(1, round(self.share * self.number))
        if self.recipe.sampling == "lattice":
            chosen = self._lattice(generator)
        elif self.recipe.sampling == "error" and self.errors is not None:
            at = torch.rand(count - count // 2, generator=generator, dtype=torch.float64) * self.errors[-1]
            by_error = torch.searchsorted(self.errors, at).clamp_max(self.number - 1)
            chosen = torch.cat([torch.randperm(self.number, generator=generator)[: count // 2], by_error])
        else:
            chosen = torch.randperm(self.number, generator=generator)[:count]
        return chosen.to(self.device)

    def _lattice(self, generator: torch.Generator) -> Tensor:
        """One point of each cell of a regular partition of the grid, which is shifted at random: all are as likely."""
        cells = self.share ** (1 / sum(size > 1 for size in self.shape))
        axes = []
        for size in self.shape:
            number = max(1, round(cells * size))
            edges = torch.arange(number + 1) * size // number
            axes.append((edges[:-1], edges[1:] - edges[:-1]))
        grids = torch.meshgrid(*(torch.arange(len(first)) for first, _ in axes), indexing="ij")
        index = torch.zeros_like(grids[0])
        for size, (first, width), cell in zip(self.shape, axes, grids, strict=True):
            at = (torch.rand(index.shape, generator=generator) * width[cell]).long()
            shift = int(torch.randint(size, (), generator=generator))
            index = index * size + (first[cell] + torch.minimum(at, width[cell] - 1) + shift) % size
        return index.view(-1)

    def look(self, psnr: float, errors: Tensor | None) -> None:
        """See the PSNR of the signal, and the squared error of each point [P]."""
        self.share = share(self.recipe, psnr)
        if errors is not None and torch.isfinite(errors).all():
            self.errors = (errors.cpu().double() + 1e-12).cumsum(0)

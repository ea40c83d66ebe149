"""Learning rates over a fit: pure functions of each signal's step and progress."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strainer_fast.fitting.recipe import Recipe

LAST = 0.02
"""What a cosine schedule ends at."""

PATIENCE = 5
MIN_GAIN_DB = 0.1
"""A plateau is this many looks in a row without a gain of this much."""


def factor(
    recipe: Recipe,
    step: Tensor,  # [N] or [], steps taken so far
    halvings: Tensor,  # of the same shape
) -> Tensor:  # float64, of the same shape
    """What the learning rate of the next step is multiplied by."""
    t = step.double()
    out = torch.ones_like(t)
    if recipe.schedule == "cosine":
        rest = max(1, recipe.steps - recipe.warmup_steps)
        done = ((t - recipe.warmup_steps) / rest).clamp(0, 1)
        out = LAST + (1 - LAST) * 0.5 * (1 + torch.cos(math.pi * done))
    elif recipe.schedule == "plateau":
        out = 0.5 ** halvings.double()
    if recipe.warmup_steps:
        out = out * ((t + 1) / recipe.warmup_steps).clamp(max=1)
    return out


class Plateau:
    """Counts how often each signal's PSNR has stopped growing: the progress of schedule "plateau"."""

    def __init__(self, num_signals: int) -> None:
        self.best = np.full(num_signals, -np.inf)
        self.waited = np.zeros(num_signals, dtype=np.int64)

    def look(self, psnr: NDArray[np.float64], due: NDArray[np.bool_]) -> list[int]:
        """Signals that are on a plateau at this look, by their PSNR [N]; `due` [N] says whose look it is."""
        gained = due & (psnr > self.best + MIN_GAIN_DB)
        self.best = np.where(gained, psnr, self.best)
        self.waited = np.where(gained, 0, self.waited + due)
        flat = self.waited >= PATIENCE
        self.waited[flat] = 0
        return np.flatnonzero(flat).tolist()

    def select(self, rows: Sequence[int]) -> None:
        """Keep what is known of these signals only."""
        self.best, self.waited = self.best[list(rows)], self.waited[list(rows)]

    def join(self, other: Plateau) -> None:
        """Count for the signals of another one after these."""
        self.best = np.concatenate([self.best, other.best])
        self.waited = np.concatenate([self.waited, other.waited])

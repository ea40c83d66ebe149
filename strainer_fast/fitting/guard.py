"""Roll-back of fits that spike: the best weights so far, kept beside the running ones."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strainer_fast.fitting.optim import Optimiser


class Guard:
    """What `Recipe.guard_db` asks for, at every check.

    A non-finite loss, or a PSNR more than guard_db below the best one at a check so far, puts the best weights back
    with a fresh optimiser state and half the learning rate, once; the second time (or at the last step) the fit ends
    with the best weights.

    Args:
        parameters: stacked [N, ...].
        guard_db: dB.
    """

    def __init__(self, parameters: Sequence[Tensor], guard_db: float) -> None:
        num = parameters[0].shape[0]
        self.best = [p.detach().clone() for p in parameters]
        self.best_mse = np.full(num, np.inf)
        self.rollbacks = np.zeros(num, dtype=np.int64)
        self.spike = 10 ** (guard_db / 10)

    def look(
        self,
        mse: NDArray[np.float64],  # [N]
        parameters: Sequence[Tensor],
        due: NDArray[np.bool_],  # [N]: whether this is a check of theirs
        last: NDArray[np.bool_],  # [N]: and whether it is the last one
    ) -> tuple[list[int], list[int]]:
        """(networks that have diverged, networks to roll back) by their errors; keeps the weights of the best."""
        spiked = due & (~np.isfinite(mse) | (mse > self.spike * self.best_mse))
        better = due & ~spiked & (mse <= self.best_mse)
        self.best_mse[better] = mse[better]
        index = torch.from_numpy(np.flatnonzero(better))
        for kept, p in zip(self.best, parameters, strict=True):
            kept[index.to(p.device)] = p.detach()[index.to(p.device)]
        ended = spiked & ((self.rollbacks > 0) | last)
        return np.flatnonzero(ended).tolist(), np.flatnonzero(spiked & ~ended).tolist()

    @torch.no_grad()
    def roll_back(self, networks: Sequence[int], parameters: Sequence[Tensor], optimiser: Optimiser) -> None:
        """Put the best weights of these networks back, with a fresh optimiser and half the learning rate."""
        for n in networks:
            for p, kept in zip(parameters, self.best, strict=True):
                p[n] = kept[n]
            optimiser.restart(n)
            self.rollbacks[n] += 1

    def select(self, networks: Sequence[int]) -> None:
        """Keep what is known of these networks only."""
        self.best = [kept[list(networks)] for kept in self.best]
        self.best_mse, self.rollbacks = self.best_mse[list(networks)], self.rollbacks[list(networks)]

    def join(self, other: Guard) -> None:
        """Watch the networks of another one after these."""
        self.best = [torch.cat(pair) for pair in zip(self.best, other.best, strict=True)]
        self.best_mse = np.concatenate([self.best_mse, other.best_mse])
        self.rollbacks = np.concatenate([self.rollbacks, other.rollbacks])

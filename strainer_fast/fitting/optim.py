"""Optimisers for stacked parameters: the state of each signal is its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strainer_fast.fitting.recipe import Recipe


def rows(per_signal: Tensor, like: Tensor) -> Tensor:
    """Shape a value per signal ([N], or [] for all) so that it broadcasts over stacked parameters [N, ...]."""
    return per_signal if per_signal.ndim == 0 else per_signal.view(-1, *[1] * (like.ndim - 1))


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1) over parameters stacked [N, ...], with a step count per signal.

    Args:
        parameters: leaf tensors, updated in place.
        recipe: learning_rate, betas, eps.
        num_signals: N for stacks of independent networks; None where parameters are shared and there is one count.
    """

    def __init__(self, parameters: Sequence[Tensor], recipe: Recipe, num_signals: int | None) -> None:
        self.recipe = recipe
        self.exp_avg = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.exp_avg_sq = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        shape = () if num_signals is None else (num_signals,)
        self.step = torch.zeros(shape, dtype=torch.int64, device=parameters[0].device)

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step, in place."""
        beta1, beta2 = self.recipe.betas
        self.step += 1
        # In float64: 1 - 0.999^t loses four digits in float32 at t = 1.
        step = self.step.double()
        step_size = (self.recipe.learning_rate / (1 - beta1**step)).float()
        correction = (1 - beta2**step).sqrt().float()
        for p, g, m, v in zip(parameters, gradients, self.exp_avg, self.exp_avg_sq, strict=True):
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v.sqrt() / rows(correction, v)).add_(self.recipe.eps)
            p.sub_(rows(step_size, m) * m / denominator)

    def select(self, indices: Tensor) -> None:
        """Keep the state of these signals only."""
        self.exp_avg = [m[indices] for m in self.exp_avg]
        self.exp_avg_sq = [v[indices] for v in self.exp_avg_sq]
        self.step = self.step[indices]

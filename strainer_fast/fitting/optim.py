"""Optimisers for stacked parameters: the state of each signal is its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.schedule import factor


def rows(per_signal: Tensor, like: Tensor) -> Tensor:
    """Shape a value per signal ([N], or [] for all) so that it broadcasts over stacked parameters [N, ...]."""
    return per_signal if per_signal.ndim == 0 else per_signal.view(-1, *[1] * (like.ndim - 1))


class Optimiser(ABC):
    """What all optimisers share: a step count and a factor of the learning rate per signal.

    Args:
        parameters: leaf tensors, updated in place: weight and bias of each layer in turn.
        recipe: the optimiser's settings.
        num_signals: N for stacks of independent networks; None where parameters are shared and there is one count.
    """

    def __init__(self, parameters: Sequence[Tensor], recipe: Recipe, num_signals: int | None) -> None:
        self.recipe = recipe
        # On the host, which decides by them: they never depend on what the device computes.
        self.step = torch.zeros(() if num_signals is None else (num_signals,), dtype=torch.int64)  # since `restart`
        self.taken = torch.zeros_like(self.step)  # in all, which the schedule goes by
        self.scale = torch.ones(self.step.shape, dtype=torch.float64)  # of the learning rate
        self.halvings = torch.zeros_like(self.step)  # by schedule "plateau"

    def settle(self, parameters: Sequence[Tensor], losses: Tensor, gradients: list[Tensor]) -> Tensor:  # [N]
        """See the losses of the weights as they are; may put other weights, and their gradients, back in place.

        Returns the losses of the weights that are now in place.
        """
        return losses

    @abstractmethod
    def update(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step, in place."""

    def state(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold, by name; the tensors themselves."""
        return {"step": self.step, "taken": self.taken, "scale": self.scale, "halvings": self.halvings}

    def select(self, indices: Tensor) -> None:
        """Keep the state of these signals only."""
        host = indices.cpu()
        self.step, self.taken = self.step[host], self.taken[host]
        self.scale, self.halvings = self.scale[host], self.halvings[host]

    def restart(self, signal: int) -> None:
        """Forget the state of one signal and halve its learning rate."""
        self.step[signal] = 0
        self.scale[signal] /= 2

    def advance(self) -> None:
        """Count a step."""
        self.step += 1
        self.taken += 1

    def learning_rate(self) -> Tensor:  # [N] or [], float64
        """Of the next step of each signal."""
        return self.recipe.learning_rate * self.scale * factor(self.recipe, self.taken, self.halvings)


class Adam(Optimiser):
    """Adam (Kingma and Ba 2015, algorithm 1) over parameters stacked [N, ...], with a step count per signal.

    While all counts are equal, PyTorch's fused kernel does the step, which touches each parameter once. The recipe's
    learning_rate, schedule, betas and eps count.
    """

    def __init__(self, parameters: Sequence[Tensor], recipe: Recipe, num_signals: int | None) -> None:
        super().__init__(parameters, recipe, num_signals)
        self.exp_avg = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.exp_avg_sq = [torch.zeros_like(p, requires_grad=False) for p in parameters]

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step, in place."""
        self.apply(parameters, gradients, self.learning_rate())

    def apply(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], learning_rate: Tensor) -> None:
        """One step with a learning rate per signal."""
        step, rate = self.step.flatten(), learning_rate.flatten()
        if bool((step == step[0]).all() and (rate == rate[0]).all()):
            self._fused(parameters, gradients, int(step[0]), float(rate[0]))
        else:
            self._per_signal(parameters, gradients, learning_rate)
        self.advance()

    def _fused(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], step: int, rate: float) -> None:
        beta1, beta2 = self.recipe.betas
        adam(
            [p.detach() for p in parameters],
            # The fused kernel walks through memory: gradients of batched products come transposed.
            [g.contiguous() for g in gradients],
            self.exp_avg,
            self.exp_avg_sq,
            [],
            [torch.tensor(float(step), device=p.device) for p in parameters],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=rate,
            weight_decay=0.0,
            eps=self.recipe.eps,
            maximize=False,
        )

    def _per_signal(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor], rate: Tensor) -> None:
        beta1, beta2 = self.recipe.betas
        # In float64: 1 - 0.999^t loses four digits in float32 at t = 1.
        step = (self.step + 1).double()
        device = parameters[0].device
        step_size = (rate / (1 - beta1**step)).float().to(device)
        correction = (1 - beta2**step).sqrt().float().to(device)
        for p, g, m, v in zip(parameters, gradients, self.exp_avg, self.exp_avg_sq, strict=True):
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            denominator = (v.sqrt() / rows(correction, v)).add_(self.recipe.eps)
            p.sub_(rows(step_size, m) * m / denominator)

    def state(self) -> dict[str, Tensor]:
        """Counts and both moments."""
        moments = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return super().state() | {f"{name}.{i}": m for name, group in moments.items() for i, m in enumerate(group)}

    def select(self, indices: Tensor) -> None:
        """Keep the state of these signals only."""
        super().select(indices)
        self.exp_avg = [m[indices] for m in self.exp_avg]
        self.exp_avg_sq = [v[indices] for v in self.exp_avg_sq]

    def restart(self, signal: int) -> None:
        """Forget the state of one signal and halve its learning rate."""
        super().restart(signal)
        for state in (*self.exp_avg, *self.exp_avg_sq):
            state[signal] = 0

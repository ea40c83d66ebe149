"""Optimisers for stacked parameters: the state of each signal is its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Self, TypeAlias

import torch
from torch import Tensor
from torch.optim.adam import adam

from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.schedule import factor

Rebuild: TypeAlias = "Callable[..., Tensor]"
"""From the same tensor of one or two stacks of networks, that of a new stack."""


def selecting(indices: Tensor) -> Rebuild:
    """Keeps these rows of a stack."""
    return lambda t: t[indices.to(t.device)]


def joining(t: Tensor, u: Tensor) -> Tensor:
    """Puts the rows of a second stack after those of the first."""
    return torch.cat([t, u])


def rows(per_signal: Tensor, like: Tensor) -> Tensor:
    """Shape a value per signal ([N], or [] for all) so that it broadcasts over stacked parameters [N, ...]."""
    return per_signal if per_signal.ndim == 0 else per_signal.view(-1, *[1] * (like.ndim - 1))


def rebuilt(how: Rebuild, *groups: Sequence[Tensor]) -> list[Tensor]:
    """`how` applied to the tensors of a group, or of two side by side."""
    return [how(*each) for each in zip(*groups, strict=True)]


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
        shape = () if num_signals is None else (num_signals,)
        self.step = torch.zeros(shape, dtype=torch.int64, device="cpu")  # since `restart`
        self.taken = torch.zeros_like(self.step)  # in all, which the schedule goes by
        self.scale = torch.ones(self.step.shape, dtype=torch.float64, device="cpu")  # of the learning rate
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
        self._rebuild(selecting(indices))

    def join(self, other: Self) -> None:
        """Take the signals of another one, each with its own state, after these."""
        self._rebuild(joining, other)

    def _rebuild(self, how: Rebuild, *others: Self) -> None:
        """Replace all state that has a row per signal."""
        for name in ("step", "taken", "scale", "halvings"):
            setattr(self, name, how(getattr(self, name), *(getattr(o, name) for o in others)))

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

    def _rebuild(self, how: Rebuild, *others: Self) -> None:
        super()._rebuild(how, *others)
        self.exp_avg = rebuilt(how, self.exp_avg, *(o.exp_avg for o in others))
        self.exp_avg_sq = rebuilt(how, self.exp_avg_sq, *(o.exp_avg_sq for o in others))

    def restart(self, signal: int) -> None:
        """Forget the state of one signal and halve its learning rate."""
        super().restart(signal)
        for state in (*self.exp_avg, *self.exp_avg_sq):
            state[signal] = 0

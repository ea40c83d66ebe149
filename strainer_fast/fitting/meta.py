"""Meta-learned initialisations: MAML (Finn et al. 2017), the paper's baseline, and Reptile (Nichol et al. 2018)."""

from __future__ import annotations

import torch
from torch import Tensor

from strainer_fast import reference
from strainer_fast._random import generator_at
from strainer_fast.fitting.stepper import Stepper
from strainer_fast.ops import losses_and_gradients


class MetaStepper(Stepper):
    """Steps of a network's initial weights such that a few steps of SGD from there fit any of the signals.

    Each outer step takes `meta_batch` signals, drawn by the recipe's seed and the step. MAML differentiates through the
    inner steps, in plain PyTorch; Reptile moves towards where they end, on the fastest engine. Arguments as of Stepper;
    the parameters are one network's, the last layers stacked [1, ...].
    """

    def evaluate(self, step: int, want_gradients: bool) -> Tensor:  # [N], the same for all
        """Mean loss after the inner steps, over this step's signals, and what `update` needs."""
        recipe, number = self.optimiser.recipe, len(self.values)
        generator = generator_at(recipe.seed, step)
        chosen = torch.randperm(number, generator=generator)[: recipe.meta_batch].tolist()
        inner = self._maml if recipe.pretrain_method == "maml" else self._reptile
        outcomes = [inner(self.values[n : n + 1]) for n in chosen]
        self._gradients = [torch.stack(each).mean(0) for each in zip(*(g for _, g in outcomes), strict=True)]
        losses = torch.stack([loss for loss, _ in outcomes]).mean().expand(number).clone()
        self._keep_finite(losses)
        return losses

    def _maml(self, values: Tensor) -> tuple[Tensor, list[Tensor]]:
        recipe, start = self.optimiser.recipe, [p.detach().requires_grad_() for p in self.parameters]

        def loss_of(parameters: list[Tensor]) -> Tensor:
            return reference.mse(
                reference.siren(self.points, parameters[::2], parameters[1::2], self.omegas), values
            ).sum()

        now = start
        for _ in range(recipe.inner_steps):
            gradients = torch.autograd.grad(loss_of(now), now, create_graph=True)
            now = [p - recipe.inner_learning_rate * g for p, g in zip(now, gradients, strict=True)]
        loss = loss_of(now)
        return loss.detach(), list(torch.autograd.grad(loss, start))

    def _reptile(self, values: Tensor) -> tuple[Tensor, list[Tensor]]:
        recipe, now = self.optimiser.recipe, [p.detach().clone().requires_grad_() for p in self.parameters]
        for _ in range(recipe.inner_steps):
            _, gradients = losses_and_gradients(
                self.implementation, self.points, values, now, self.omegas, True, self.precision
            )
            with torch.no_grad():
                for p, g in zip(now, gradients, strict=True):
                    p.sub_(recipe.inner_learning_rate * g)
        loss, _ = losses_and_gradients(
            self.implementation, self.points, values, now, self.omegas, False, self.precision
        )
        scale = recipe.inner_learning_rate * recipe.inner_steps
        return loss[0], [(p.detach() - q.detach()) / scale for p, q in zip(self.parameters, now, strict=True)]

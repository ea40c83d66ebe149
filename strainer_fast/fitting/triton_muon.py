"""Muon's steps on the Triton kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from strainer_fast.fitting.muon import ADAM_SHARE, COEFFICIENTS, EPS, ITERATIONS, Muon
from strainer_fast.fitting.triton_stepper import FlatStepper


class TritonMuonStepper(FlatStepper):
    """Muon as `Muon` has it: hidden matrices in stacks of one shape, all else by the kernels' Adam."""

    optimiser: Muon

    def _prepare(self) -> None:
        """Momenta in stacks of one shape, Adam's moments of all else."""
        from strainer_fast.kernels.newton_schulz import newton_schulz_scratch
        from strainer_fast.kernels.segments import Table
        from strainer_fast.kernels.stacks import Stacks

        optimiser, device = self.optimiser, self.points.device
        table, adam = self.pipeline.table, optimiser.adam
        self.momentum = self._flattened(optimiser.buffers, optimiser.hidden)
        self.exp_avg = self._flattened(adam.exp_avg, optimiser.rest)
        self.exp_avg_sq = self._flattened(adam.exp_avg_sq, optimiser.rest)
        self.stacks = Stacks(table, [i // 2 for i in optimiser.hidden], False, 1, device)
        self.momenta, self.directions = (torch.zeros(self.stacks.size, device=device) for _ in range(2))
        self._scratch = [torch.empty(newton_schulz_scratch(b.shape), device=device) for b in self.stacks.banks]
        self.factors = torch.tensor([max(1.0, s.rows / s.columns) ** 0.5 for s in table.segments], device=device)
        segments = [replace(s, trained=i in optimiser.rest) for i, s in enumerate(table.segments)]
        self.adams = Table(segments, table.groups, device)
        self.step = torch.zeros_like(self.bad)
        self.adam_rate = torch.zeros_like(self.learning_rate)

    def _launch_update(self) -> None:
        from strainer_fast.kernels.muon import launch_momenta, launch_muon_update
        from strainer_fast.kernels.newton_schulz import launch_newton_schulz
        from strainer_fast.kernels.optim import launch_adam, launch_advance

        pipeline, stacks, recipe = self.pipeline, self.stacks, self.optimiser.recipe
        launch_momenta(
            pipeline.table, stacks, self.gradients, self.momentum, self.bad, self.momenta, keep=self.optimiser.momentum
        )
        for bank, scratch in zip(stacks.banks, self._scratch, strict=True):
            matrices, out = stacks.stack(self.momenta, bank), stacks.stack(self.directions, bank)
            launch_newton_schulz(matrices, out, scratch, steps=ITERATIONS, coefficients=COEFFICIENTS, eps=EPS)
        torch.mul(self.learning_rate, ADAM_SHARE, out=self.adam_rate)
        # Adam first: it keeps all weights as they were, and writes all copies.
        launch_adam(
            self.adams,
            self.flat,
            self.gradients,
            self.exp_avg,
            self.exp_avg_sq,
            self.step,
            self.adam_rate,
            self.bad,
            pipeline.copies,
            pipeline.exact_copies,
            self.previous,
            beta1=recipe.betas[0],
            beta2=recipe.betas[1],
            eps=recipe.eps,
            precision=self.precision,
        )
        launch_muon_update(
            pipeline.table, stacks, self.flat, self.learning_rate, self.bad, self.directions, self.factors,
            pipeline.copies, pipeline.exact_copies, precision=self.precision,
        )  # fmt: skip
        launch_advance(self.step, self.bad, self.skipped)

    def update(self) -> None:
        """Muon's step with the gradients of the last `evaluate`."""
        super().update()
        self.optimiser.adam.advance()

    def look(self, watched: Sequence[Tensor] | None = None) -> None:
        """Step counts to the host, and what every stepper looks for."""
        if watched is None:
            for optimiser in (self.optimiser, self.optimiser.adam):
                optimiser.step.copy_(self.step.cpu().view(optimiser.step.shape))
        super().look(watched)

    def changed(self) -> None:
        """Step counts too from what was changed outside."""
        self.step.copy_(self.optimiser.step.view(-1))
        super().changed()

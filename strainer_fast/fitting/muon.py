"""Muon: momentum, orthogonalised, for the hidden matrices; Adam for the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from strainer_fast.fitting.optim import Adam, Optimiser, Rebuild, rebuilt, rows
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.ops.dispatch import triton_missing
from strainer_fast.ops.triton import on_device

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPS = 1e-7
ADAM_SHARE = 0.5
"""Adam's learning rate for all else, as a share of Muon's: see benchmarks/time_to_psnr."""


def orthogonalise(x: Tensor) -> Tensor:  # [N, out, in] -> [N, out, in]
    """Drive the singular values of each matrix to about 1 by Newton and Schulz's iteration (Jordan et al. 2024).

    X = x / |x|, then five times X = a X + (b A + c A A) X with A = X X^T, on the smaller side; batched, in float32.
    On a GPU by the Triton kernel of strainer_fast.kernels.newton_schulz.
    """
    if x.is_cuda and triton_missing(x.device) is None:
        from strainer_fast.kernels.newton_schulz import launch_newton_schulz, newton_schulz_scratch

        x = x.contiguous()
        out, scratch = torch.empty_like(x), x.new_empty(newton_schulz_scratch(x.shape))
        with on_device(x):
            launch_newton_schulz(x, out, scratch, steps=ITERATIONS, coefficients=COEFFICIENTS, eps=EPS)
        return out
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + EPS)
    x = x.mT if tall else x
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(Optimiser):
    """Muon (Jordan et al. 2024; scaled as torch.optim.Muon's "original") over stacks of networks.

    Hidden matrices, which are the weights of all sine layers but the first, move by learning_rate times their
    orthogonalised Nesterov momentum, matrices of one shape in one batch; first layer, heads and biases by Adam at half
    that rate. The recipe's learning_rate, schedule, momentum (0.95), betas and eps count.

    Args:
        parameters, recipe, num_signals: see Optimiser.
        num_frozen: layers before these, which do not move.
    """

    def __init__(
        self, parameters: Sequence[Tensor], recipe: Recipe, num_signals: int | None, num_frozen: int = 0
    ) -> None:
        super().__init__(parameters, recipe, num_signals)
        self.hidden = range(0 if num_frozen else 2, len(parameters) - 2, 2)
        self.rest = [i for i in range(len(parameters)) if i not in self.hidden]
        self.momentum = MOMENTUM if recipe.momentum is None else recipe.momentum
        self.buffers = [torch.zeros_like(parameters[i], requires_grad=False) for i in self.hidden]
        self.adam = Adam([parameters[i] for i in self.rest], recipe, num_signals)

    @torch.no_grad()
    def update(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One step, in place."""
        rate = self.learning_rate()
        self.adam.apply([parameters[i] for i in self.rest], [gradients[i] for i in self.rest], ADAM_SHARE * rate)
        momenta = []
        for buffer, i in zip(self.buffers, self.hidden, strict=True):
            buffer.lerp_(gradients[i], 1 - self.momentum)
            momenta.append(torch.lerp(gradients[i], buffer, self.momentum))
        on_device = rate.float().to(parameters[0].device)
        for i, direction in zip(self.hidden, _orthogonalise_all(momenta), strict=True):
            p = parameters[i]
            out, width = p.shape[-2:]
            per_signal = rows(on_device, p) if p.ndim == 3 else on_device.flatten()[0]
            p.sub_(per_signal * max(1.0, out / width) ** 0.5 * direction)
        self.advance()

    def state(self) -> dict[str, Tensor]:
        """Counts, momenta and the state of Adam."""
        momenta = {f"momentum.{i}": b for i, b in enumerate(self.buffers)}
        return super().state() | momenta | {f"adam.{name}": t for name, t in self.adam.state().items()}

    def _rebuild(self, how: Rebuild, *others: Self) -> None:
        super()._rebuild(how, *others)
        self.buffers = rebuilt(how, self.buffers, *(o.buffers for o in others))
        self.adam._rebuild(how, *(o.adam for o in others))

    def restart(self, signal: int) -> None:
        """Forget the state of one signal and halve its learning rate."""
        super().restart(signal)
        self.adam.restart(signal)
        for buffer in self.buffers:
            buffer[signal] = 0


def _orthogonalise_all(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix, or stack of matrices, orthogonalised; all of one shape in one batch."""
    out: list[Tensor | None] = [None] * len(matrices)
    shapes = {m.shape[-2:] for m in matrices}
    for shape in shapes:
        members = [i for i, m in enumerate(matrices) if m.shape[-2:] == shape]
        done = orthogonalise(torch.cat([matrices[i].reshape(-1, *shape) for i in members]))
        parts = torch.split(done, [matrices[i].numel() // shape.numel() for i in members])
        for i, part in zip(members, parts, strict=True):
            out[i] = part.reshape(matrices[i].shape)
    return [m for m in out if m is not None]

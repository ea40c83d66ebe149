"""Training steps to measure, as data, and their exact results."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast.benchmarks.harness import Named
from strainer_fast.ops import losses_and_gradients

CHUNK = 2**15
"""Points that the truth is computed on at once."""

STACK = 2**22
"""Numbers of a layer of independent networks that it is computed on at once."""

Result = tuple[Tensor, list[Tensor]]
"""Losses [N] and gradients of their sum."""


@dataclass(frozen=True)
class Case:
    """One training step (forward, loss, backward) of one network, one STRAINER with N heads, or N small networks."""

    name: str
    size: int  # image of size x size points
    width: int
    num_layers: int
    num_signals: int = 1
    independent: bool = False  # N separate networks rather than one encoder with N heads
    channels: int = 1
    threads: int = 2
    quick: bool = False  # part of `strainer-fast bench --quick`
    table: str = "step"  # "step" has every peer, "sizes" ours and autograd

    @property
    def flops(self) -> int:
        """Of the products of a step: forward, both backward ones, none back to the coordinates. Sines do not count."""
        widths = [2, *[self.width] * (self.num_layers - 1)]
        copies = self.num_signals if self.independent else 1
        hidden = sum(2 * a * b * (2 if i == 0 else 3) for i, (a, b) in enumerate(pairwise(widths)))
        heads = 3 * 2 * self.width * self.channels * self.num_signals
        return self.size**2 * (hidden * copies + heads)

    @property
    def axes(self) -> dict[str, int]:
        """What plots have on their axes."""
        return {"points": self.size**2, "width": self.width, "signals": self.num_signals}


@dataclass(frozen=True)
class Problem:
    """A case's tensors."""

    points: Tensor  # [P, 2]
    values: Tensor  # [N, P, C]
    parameters: list[Tensor]  # weight, bias of each layer; stacked [N, ...] for heads and for independent networks
    omegas: tuple[float, ...]

    @classmethod
    def of(cls, case: Case, device: str = "cpu") -> Problem:
        """Real-sized tensors, drawn by SIREN's rules; targets are noise, which costs the same as an image."""
        torch.manual_seed(0)
        points = sf.signals.grid((case.size, case.size))
        values = torch.rand(case.num_signals, points.shape[0], case.channels)
        if case.independent:
            stack = sf.BatchedSiren(case.num_signals, 2, case.width, case.num_layers, case.channels)
            parameters, omegas = list(stack.parameters()), stack.omegas
        else:
            shared = case.num_layers - 1
            model = sf.Strainer(2, case.width, case.num_layers, case.channels, shared, case.num_signals)
            layers = [*model.encoder.layers, model.head]
            parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
            omegas = model.architecture.omegas
        leaves = [p.detach().to(device).requires_grad_() for p in parameters]
        return cls(points.to(device), values.to(device), leaves, omegas)


def named(result: Result) -> Named:
    """Losses and gradients, each with a name."""
    losses, gradients = result
    return {"losses": losses, **{f"gradient {i}": g for i, g in enumerate(gradients)}}


def truth_of(problem: Problem) -> Result:
    """Autograd in float64, a part of the points or some networks at a time, to bound the memory."""

    def double(t: Tensor) -> Tensor:
        return t.detach().double()

    independent = problem.parameters[0].ndim == 3
    parts = []
    if not independent:
        parameters = [double(p).requires_grad_() for p in problem.parameters]
        chunks = zip(torch.split(problem.points, CHUNK), torch.split(problem.values, CHUNK, dim=1), strict=True)
        for points, values in chunks:
            share = points.shape[0] / problem.points.shape[0]
            losses, gradients = losses_and_gradients(
                "torch", double(points), double(values), parameters, problem.omegas, True
            )
            parts.append((losses * share, [g * share for g in gradients]))
        summed = [torch.stack(g).sum(0) for g in zip(*(g for _, g in parts), strict=True)]
        return torch.stack([losses for losses, _ in parts]).sum(0), summed
    width = problem.parameters[0].shape[1]
    size = max(1, STACK // (problem.points.shape[0] * width))
    for n in range(0, problem.values.shape[0], size):
        parameters = [double(p[n : n + size]).requires_grad_() for p in problem.parameters]
        own = double(problem.values[n : n + size])
        parts.append(losses_and_gradients("torch", double(problem.points), own, parameters, problem.omegas, True))
    gradients = [torch.cat(g) for g in zip(*(g for _, g in parts), strict=True)]
    return torch.cat([losses for losses, _ in parts]), gradients


CASES = (
    Case("178x178, 5x256, 1 thread", 178, 256, 6, threads=1),
    Case("178x178, 5x256", 178, 256, 6, quick=True),
    Case("178x178, 5x256, 10 heads", 178, 256, 6, num_signals=10, channels=3, quick=True),
    Case("64 networks 3x32, 28x28", 28, 32, 4, num_signals=64, independent=True, quick=True),
    Case("64 networks 3x64, 32x32", 32, 64, 4, num_signals=64, independent=True, channels=3),
    *(
        Case(f"5x{width}, 178x178", 178, width, 6, threads=threads, table="sizes")
        for width in (16, 32, 64, 128, 256, 512)
        for threads in (1, 2)
    ),
    *(
        Case(f"5x256, {size}x{size}", size, 256, 6, table="sizes", quick=size in (32, 64))
        for size in (16, 32, 64, 128, 256, 512, 1024)
    ),
)

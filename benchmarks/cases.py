"""What is measured, as data."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

import strainer_fast as sf


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
    quick: bool = False  # part of `make bench-quick`
    suite: str = "step"  # which table: "step" has every peer, "sizes" ours and autograd

    @property
    def flops(self) -> int:
        """Of the products of a step: forward, both backward ones, none back to the coordinates. Sines do not count."""
        widths = [2, *[self.width] * (self.num_layers - 1)]
        copies = self.num_signals if self.independent else 1
        hidden = sum(2 * a * b * (2 if i == 0 else 3) for i, (a, b) in enumerate(pairwise(widths)))
        heads = 3 * 2 * self.width * self.channels * self.num_signals
        return self.size**2 * (hidden * copies + heads)


@dataclass(frozen=True)
class Problem:
    """A case's tensors."""

    points: Tensor  # [P, 2]
    values: Tensor  # [N, P, C]
    parameters: list[Tensor]  # weight, bias of each layer; stacked [N, ...] for heads and for independent networks
    omegas: tuple[float, ...]

    @classmethod
    def of(cls, case: Case) -> Problem:
        """Real-sized tensors, drawn by SIREN's rules; targets are noise, which costs the same as an image."""
        torch.manual_seed(0)
        points = sf.signals.grid((case.size, case.size))
        values = torch.rand(case.num_signals, points.shape[0], case.channels)
        if case.independent:
            stack = sf.BatchedSiren(case.num_signals, 2, case.width, case.num_layers, case.channels)
            return cls(points, values, list(stack.parameters()), stack.omegas)
        model = sf.Strainer(2, case.width, case.num_layers, case.channels, case.num_layers - 1, case.num_signals)
        layers = [*model.encoder.layers, model.head]
        return cls(
            points, values, [p for layer in layers for p in (layer.weight, layer.bias)], model.architecture.omegas
        )


CASES = (
    Case("178x178, 5x256, 1 thread", 178, 256, 6, threads=1),
    Case("178x178, 5x256", 178, 256, 6, quick=True),
    Case("178x178, 5x256, 10 heads", 178, 256, 6, num_signals=10),
    Case("64 networks 3x32, 28x28", 28, 32, 4, num_signals=64, independent=True, quick=True),
    Case("64 networks 3x64, 32x32", 32, 64, 4, num_signals=64, independent=True, channels=3),
    *(
        Case(f"5x{width}, {size}x{size}", size, width, 6, threads=threads, suite="sizes")
        for size, width in (
            *((178, width) for width in (16, 32, 64, 128, 256, 512)),
            *((size, 256) for size in (16, 64, 512)),
        )
        for threads in (1, 2)
    ),
)

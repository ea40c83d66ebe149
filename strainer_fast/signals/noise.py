"""Signals that are noise, to pre-train encoders without data (arXiv 2603.29034)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from strainer_fast._checks import bad_input, check_choice, check_count, check_real
from strainer_fast._random import generator_at
from strainer_fast.signals.signal import Signal

KINDS = ("uniform", "gaussian", "spectrum", "dead-leaves")
GAUSSIAN_DEVIATION = 0.2
SMALLEST_LEAF, LARGEST_LEAF = 0.02, 0.4
"""Radii of dead leaves, as shares of the shortest axis."""
MAX_LEAVES = 2000


def noise(
    kind: str,
    count: int = 10,
    size: int | Sequence[int] = 178,
    *,
    channels: int = 1,
    amplitude: float = 1.0,
    seed: int = 0,
) -> list[Signal]:
    """Signals of random values in [0, 1].

    Args:
        kind: "uniform" and "gaussian" (deviation 0.2) are independent from sample to sample; "spectrum" has amplitudes
            that fall as 1/f, as those of photographs do; "dead-leaves" are discs of one value each that hide each
            other, with radii of density r^-3 (Lee, Mumford and Huang 2001).
        count: how many.
        size: samples per axis, (height, width) for images; an int for a square image.
        channels: values per point.
        amplitude: in (0, 1]: values are drawn towards 0.5 by it.
        seed: of the random numbers; signal i is the same whatever `count` is.

    Raises InputError for an unknown kind or a number out of range.
    """
    check_choice("kind", kind, KINDS)
    check_count("count", count)
    check_count("seed", seed, 0, 2**62)
    sizes = tuple(size) if isinstance(size, Sequence) else (size, size)
    shape = tuple(check_count("size", n) for n in sizes)
    check_count("channels", channels)
    if check_real("amplitude", amplitude, above=0) > 1:
        raise bad_input("amplitude", "a number in (0, 1]", amplitude, "Values are in [0, 1].")
    draw = {"uniform": _uniform, "gaussian": _gaussian, "spectrum": _spectrum, "dead-leaves": _dead_leaves}[kind]
    signals = []
    for i in range(count):
        generator = generator_at(seed, i)
        values = draw((*shape, channels), generator)
        signals.append(Signal((0.5 + amplitude * (values - 0.5)).clamp(0, 1), f"noise-{kind}-{i}"))
    return signals


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator)


def _gaussian(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 0.5 + GAUSSIAN_DEVIATION * torch.randn(shape, generator=generator)


def _spectrum(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """White noise, filtered; each channel stretched to [0, 1]."""
    axes = tuple(range(len(shape) - 1))
    square = torch.zeros(shape[:-1])
    for axis, n in enumerate(shape[:-1]):
        square = square + torch.fft.fftfreq(n).square().view(*[-1 if a == axis else 1 for a in axes])
    frequency = square.sqrt().unsqueeze(-1)
    lowest = 1 / max(shape[:-1])
    filtered = torch.fft.fftn(torch.randn(shape, generator=generator), dim=axes) / frequency.clamp_min(lowest)
    values: Tensor = torch.fft.ifftn(filtered, dim=axes).real
    low, high = values.amin(axes, keepdim=True), values.amax(axes, keepdim=True)
    return (values - low) / (high - low).clamp_min(1e-12)


def _dead_leaves(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """The nearest leaf first, until nothing is left to cover."""
    grids = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape[:-1]), indexing="ij")
    values = torch.rand(shape[-1:], generator=generator).expand(shape).clone()
    free = torch.ones(shape[:-1], dtype=torch.bool)
    shortest = min(shape[:-1])
    for _ in range(MAX_LEAVES):
        u = float(torch.rand((), generator=generator))
        # Density r^-3 between both radii, by its inverse distribution function.
        inverse = u / LARGEST_LEAF**2 + (1 - u) / SMALLEST_LEAF**2
        radius = max(1.0, shortest / math.sqrt(inverse))
        centre = [float(c) for c in torch.rand(len(grids), generator=generator)]
        distance = torch.stack([(g - c * n) ** 2 for g, c, n in zip(grids, centre, shape, strict=False)]).sum(0)
        covered = free & (distance <= radius**2)
        values[covered] = torch.rand(shape[-1:], generator=generator)
        free &= ~covered
        if not free.any():
            break
    return values

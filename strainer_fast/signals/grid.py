"""Coordinates of regular grids, in the one convention of the package."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

COORDINATE_CONVENTION = "[-1, 1] on every axis, both ends included, y first (ij); an axis of length 1 sits at 0"


def axis(
    length: int,
    bounds: tuple[float, float] = (-1.0, 1.0),
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [length]
    """Evenly spaced coordinates, both ends included; the middle of the bounds for a single sample."""
    low, high = bounds
    if length == 1:
        return torch.full((1,), (low + high) / 2, device=device, dtype=dtype)
    return torch.linspace(low, high, length, device=device, dtype=dtype)


def grid(
    shape: Sequence[int],
    bounds: Sequence[tuple[float, float]] | None = None,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # [P, D], P = product of shape, D = len(shape)
    """Coordinates of a regular grid in row-major order, first axis (y) first.

    Args:
        shape: samples per axis, for example (height, width).
        bounds: (low, high) per axis; None is the whole square [-1, 1] of every axis.
        device, dtype: of the result.
    """
    bounds = [(-1.0, 1.0)] * len(shape) if bounds is None else bounds
    return mesh([axis(n, b, device=device, dtype=dtype) for n, b in zip(shape, bounds, strict=True)])


def mesh(axes: Sequence[Tensor]) -> Tensor:  # D of [length] -> [P, D]
    """All combinations of coordinates, the last axis fastest."""
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(axes))

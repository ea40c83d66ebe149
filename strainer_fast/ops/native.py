"""Forward, loss and backward of sine networks in one sweep, by the native engine (kernels/cpu): float32 on the CPU.

The same contract as ops.tiled; a tile of about a hundred points stays in a core's first two caches, and every thread
sweeps a part of the points. docs/native.md says how.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strainer_fast.kernels import cpu
from strainer_fast.ops.tiled import Swept, empty_gradients, normalisation


def sweep(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    parameters: Sequence[Tensor],  # [out, in], [out] of each layer; from some layer on [N, out, in], [N, out]
    omegas: Sequence[float],  # L - 1
    wanted: Sequence[bool],  # which parameters need a gradient
    want_points: bool = False,
    signal_weights: Tensor | None = None,  # [N]
    point_weights: Tensor | None = None,  # [P] or [N, P]
    tile: int | None = None,
) -> Swept:
    """Losses of N signals and the gradients of their weighted sum; arguments and result as of `ops.tiled.sweep`."""
    num_signals, num_points, channels = values.shape
    gradients, point_gradient = empty_gradients(points, parameters, wanted, want_points)
    norm, scale = normalisation(values.detach(), signal_weights, point_weights)
    total = torch.zeros_like(norm)
    if num_signals == 0 or channels == 0:
        return Swept((total / norm).to(values.dtype), gradients, point_gradient)
    if point_weights is not None:
        point_weights = point_weights.detach().expand(num_signals, num_points)
    data = [p.detach().contiguous() for p in parameters]
    cpu.sweep(
        points.detach().contiguous(),
        values.detach(),
        data[::2],
        data[1::2],
        [*omegas, 1.0],
        sum(p.ndim == 2 for p in data[::2]),
        scale.contiguous(),
        point_weights,
        losses=total,
        dweights=gradients[::2],
        dbiases=gradients[1::2],
        dpoints=point_gradient,
        threads=torch.get_num_threads(),
        tile=tile or 0,
    )
    return Swept((total / norm).to(values.dtype), gradients, point_gradient)


def values(
    points: Tensor,  # [P, in]
    parameters: Sequence[Tensor],  # as of `sweep`
    omegas: Sequence[float],
) -> Tensor:  # [N, P, C]
    """What N networks give at points; no activation exists for more than a tile."""
    data = [p.detach().contiguous() for p in parameters]
    head = data[-2]
    num_signals = head.shape[0] if head.ndim == 3 else 1
    out = points.new_empty(num_signals, points.shape[0], head.shape[-2])
    if out.numel():
        cpu.values(
            points.detach().contiguous(),
            data[::2],
            data[1::2],
            [*omegas, 1.0],
            sum(p.ndim == 2 for p in data[::2]),
            out=out,
            threads=torch.get_num_threads(),
        )
    return out

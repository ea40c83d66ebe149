"""Forward, loss and backward of sine networks in one sweep, by the native engine (kernels/cpu): float32 on the CPU.

The same contract as ops.tiled; a tile of about a hundred points stays in a core's first two caches, and every thread
sweeps a part of the points. docs/native.md says how.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from strainer_fast.kernels import cpu
from strainer_fast.ops.tiled import Swept


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
    gradients = [p.new_zeros(p.shape) if w else None for p, w in zip(parameters, wanted, strict=True)]
    point_gradient = points.new_zeros(points.shape) if want_points else None
    if point_weights is None:
        norm = torch.full((num_signals,), num_points * channels, dtype=torch.float64, device=values.device)
    else:
        norm = (point_weights.detach().double().sum(-1) * channels).expand(num_signals)
        point_weights = point_weights.detach().expand(num_signals, num_points)
    scale = 2 / norm if signal_weights is None else 2 * signal_weights.double() / norm
    total = torch.zeros_like(norm)
    if num_signals == 0 or channels == 0:
        return Swept((total / norm).to(values.dtype), gradients, point_gradient)
    data = [p.detach().contiguous() for p in parameters]
    cpu.sweep(
        points.detach().contiguous(),
        values.detach(),
        data[::2],
        data[1::2],
        [*omegas, 1.0],
        sum(p.ndim == 2 for p in data[::2]),
        scale.float().contiguous(),
        point_weights,
        losses=total,
        dweights=gradients[::2],
        dbiases=gradients[1::2],
        dpoints=point_gradient,
        threads=torch.get_num_threads(),
        tile=tile or 0,
    )
    return Swept((total / norm).to(values.dtype), gradients, point_gradient)

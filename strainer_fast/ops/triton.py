"""Forward, loss and backward of sine networks by the Triton kernels: the same contract as ops.tiled, on a GPU.

Loss and gradients come from launches over waves of points (kernels/siren.py); this is the form of it that stands behind
autograd, with buffers of its own for every call. Whole fits keep theirs: fitting/triton_stepper.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

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
    precision: str = "fp32",
) -> Swept:
    """Losses of N signals and the gradients of their weighted sum; arguments and result as of `ops.tiled.sweep`.

    `tile` is the number of points of a wave; `precision` what operands of products are rounded to.
    """
    num_signals, num_points, channels = values.shape
    norm, scale = normalisation(values, signal_weights, point_weights)
    if num_signals * num_points * channels == 0:
        gradients, point_gradient = empty_gradients(points, parameters, wanted, want_points)
        return Swept((torch.zeros_like(norm) / norm).to(values.dtype), gradients, point_gradient)

    from strainer_fast.kernels.optim import launch_copies
    from strainer_fast.kernels.plan import network_of
    from strainer_fast.kernels.siren import Pipeline

    with on_device(points):
        network = network_of(points.shape[1], parameters, omegas, precision)
        pipeline = Pipeline(network, num_points, wanted, want_points, points.device, tile)
        flat = points.new_empty(pipeline.groups, pipeline.length)
        for own, p in zip(pipeline.parameters(flat), parameters, strict=True):
            own.copy_(p)
        launch_copies(pipeline.table, flat, pipeline.copies, pipeline.exact_copies, precision=precision)
        losses = points.new_empty(num_signals)
        dpoints = points.new_empty(points.shape) if want_points else None
        if point_weights is not None:
            point_weights = point_weights.expand(num_signals, num_points)
        scale = scale * pipeline.loss_scale
        shift = _shift(values, scale, point_weights)
        reduced = torch.empty_like(flat) if any(wanted) else None
        pipeline.launch(
            points,
            values,
            scale * shift,
            norm.to(torch.float32),
            losses,
            torch.zeros(pipeline.groups, dtype=torch.int32, device=points.device),
            point_weights=point_weights,
            dpoints=dpoints,
            gradients=reduced,
        )
        gradients = [None] * len(parameters)
        if reduced is not None:
            each = zip(pipeline.parameters(reduced), parameters, wanted, strict=True)
            # New tensors: an operator may not return several views of one memory.
            gradients = [g.reshape(p.shape) / shift if w else None for g, p, w in each]
        return Swept(losses, gradients, None if dpoints is None else dpoints / (pipeline.loss_scale * shift))


def _shift(values: Tensor, scale: Tensor, point_weights: Tensor | None) -> Tensor:  # []
    """The power of two by which scaled residuals become about 1, whatever values and weights are: half precision ends
    at 65,504 and loses what is below 1e-7. On the device, because the host must not wait."""
    largest = scale.abs() if point_weights is None else scale.abs() * point_weights.abs().amax(-1)
    size = largest.max() * values.abs().max().clamp_min(1.0)
    shift = torch.exp2(-torch.log2(size).round().clamp(-100, 100))
    return torch.where(torch.isfinite(size) & (size > 0), shift, torch.ones_like(shift))


def values(
    points: Tensor,  # [P, in]
    parameters: Sequence[Tensor],  # as of `sweep`
    omegas: Sequence[float],
    precision: str = "fp32",
) -> Tensor:  # [N, P, C]; N = 1 for plain networks
    """Values of networks at points, without gradients: whole networks on chip where they fit, else layer by layer."""
    from strainer_fast.kernels.optim import launch_copies
    from strainer_fast.kernels.plan import network_of
    from strainer_fast.kernels.siren import Pipeline

    network = network_of(points.shape[1], parameters, omegas, precision)
    num_signals, channels = network.stacks[-1], network.widths[-1]
    if len(points) == 0 or num_signals * channels == 0:
        return points.new_empty(num_signals, len(points), channels)
    with on_device(points):
        pipeline = Pipeline(network, len(points), [False] * len(parameters), device=points.device, values_only=True)
        flat = points.new_empty(pipeline.groups, pipeline.length)
        for own, p in zip(pipeline.parameters(flat), parameters, strict=True):
            own.copy_(p)
        launch_copies(pipeline.table, flat, pipeline.copies, pipeline.exact_copies, precision=precision)
        y = points.new_empty(pipeline.head_networks, len(points), pipeline.columns)
        pipeline.values(points, y)
        each = y.view(pipeline.head_networks, len(points), -1, channels).movedim(2, 1)
        return each.reshape(num_signals, len(points), channels)


def path_of(coordinates: int, channels: int, width: int, num_layers: int, precision: str, device: torch.device) -> str:
    """How a training step of such networks runs on this device: on chip or by layers, in words."""
    from strainer_fast.kernels.on_chip import fits_on_chip
    from strainer_fast.kernels.plan import padded

    with on_device(torch.empty(0, device=device)):
        whole = num_layers > 1 and fits_on_chip("network_step", coordinates, padded(width), channels, precision)
    return f"whole networks on chip, {precision}" if whole else f"layer by layer over waves of points, {precision}"


def whole_rounds(networks: int, device: torch.device) -> int:
    """At most so many networks: what a launch takes, in whole rounds where one does not hold them all at once."""
    from strainer_fast.kernels.checks import MOST_NETWORKS
    from strainer_fast.kernels.on_chip import programs_at_once

    with on_device(torch.empty(0, device=device)):
        round_ = programs_at_once()
    networks = min(networks, MOST_NETWORKS)
    return networks - networks % round_ if networks > round_ else networks


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Within, kernels are launched on the device of `tensor`."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()

"""Launchers of the kernels in network.py, on the weights that siren.Pipeline keeps."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .checks import (
    cdiv,
    check_networks,
    check_precision,
    check_same_device,
    check_tensor,
    launch_options,
    wrong,
)
from .chip import current_chip
from .configs import FEW_INPUTS, supports, tiles_for
from .heads import MOST_COLUMNS
from .network import network_forward_kernel, network_step_kernel
from .tiles import Tiles


@dataclass(frozen=True)
class Weights:
    """Weights of N networks of equally wide sine layers, padded, omega folded in; or partial sums of their gradients.

    Hidden layers lie at equal distances: `w` and `b` are the first of them, of `hidden` in all.
    """

    first_w: Tensor  # [N, width, in] float32, contiguous
    first_b: Tensor  # [N, width] float32
    w: Tensor  # [N, width, width], contiguous; anything where hidden is 0
    b: Tensor  # [N, width] float32
    head_w: Tensor  # [N, outputs, width], contiguous
    head_b: Tensor  # [N, outputs] float32
    hidden: int
    stride_w: int  # elements from a hidden layer to the next
    stride_b: int


def fits_on_chip(kernel: str, coordinates: int, width: int, columns: int, precision: str) -> bool:
    """Whether "network_forward" or "network_step" takes such networks on this chip."""
    return coordinates <= FEW_INPUTS and columns <= MOST_COLUMNS and supports(kernel, precision, width)


def programs_at_once() -> int:
    """Programs of a training step that run side by side on this chip: two a processor."""
    return 2 * current_chip().processors


def step_programs(points: int, networks: int, width: int, precision: str) -> tuple[int, int]:
    """(splits of the points, programs) of `launch_network_step`; the same every time."""
    t, most = tiles_for("network_step", precision, width), programs_at_once()
    splits = max(1, min(cdiv(points, t.points), most // networks))
    return splits, min(networks * splits, 2 * most)


def scratch_size(programs: int, hidden: int, width: int, precision: str) -> int:
    """Operands of scratch that `launch_network_step` needs."""
    block: int = max(16, triton.next_power_of_2(width))
    return programs * (hidden + 1) * 2 * tiles_for("network_step", precision, width).points * block


def launch_network_forward(
    x: Tensor,  # [P, in] (shared) or [N, P, in] float32, any strides
    weights: Weights,
    y: Tensor,  # [N, P, outputs] float32, contiguous; overwritten
    *,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """Values of whole networks at points.

    Raises ValueError for tensors that do not belong together or a width the chip does not hold (see `fits_on_chip`).
    """
    networks, outputs, width = _check_weights(weights)
    check_precision(precision)
    check_networks(networks)
    check_tensor("x", x, (networks, None, weights.first_w.shape[2])[3 - x.ndim :])
    points = x.shape[-2]
    check_tensor("y", y, (networks, points, outputs), contiguous=True)
    check_same_device(x=x, y=y, weights=weights.w)
    if y.numel() == 0:
        return
    t = tiles or tiles_for("network_forward", precision, width)
    network_forward_kernel[(cdiv(points, t.points), networks)](
        x,
        weights.first_w,
        weights.first_b,
        weights.w,
        weights.b,
        weights.head_w,
        weights.head_b,
        y,
        points,
        weights.hidden,
        outputs,
        *(x.stride() if x.ndim == 3 else (0, *x.stride())),
        weights.stride_w,
        weights.stride_b,
        FIRST=x.shape[-1],
        WIDTH=width,
        BLOCK_P=t.points,
        BLOCK_C=max(16, triton.next_power_of_2(outputs)),
        BLOCK_H=max(16, triton.next_power_of_2(width)),
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages),
    )


def launch_network_step(
    x: Tensor,  # [P, in] float32, any strides
    weights: Weights,
    values: Tensor,  # [N * heads, P, C] float32, any strides
    scale: Tensor,  # [N * heads] float32: of the gradients
    sums: Tensor,  # [S, N, heads * C] float32, contiguous; overwritten: weighted squares, summed
    gradients: Weights,  # partial sums [S, N, ...] float32; overwritten
    scratch: Tensor,  # flat operands, `scratch_size` of them
    programs: int,
    *,
    point_weights: Tensor | None = None,  # [N * heads, P] float32, any strides
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """Losses and all gradients of whole networks: what heads.launch_heads_loss is for heads.

    Raises ValueError for tensors that do not belong together or a width the chip does not hold (see `fits_on_chip`).
    """
    networks, outputs, width = _check_weights(weights)
    check_precision(precision)
    splits, points = sums.shape[0], x.shape[0]
    check_tensor("x", x, (None, weights.first_w.shape[2]))
    check_tensor("values", values, (None, points, None))
    signals, _, channels = values.shape
    if signals * channels != networks * outputs:
        got = f"{list(values.shape)} for {networks} networks of {outputs} columns"
        raise wrong("values", "a signal per head, a channel per column", got, "See the launcher's docstring.")
    check_tensor("scale", scale, (signals,), contiguous=True)
    check_tensor("sums", sums, (None, networks, outputs), contiguous=True)
    if point_weights is not None:
        check_tensor("point_weights", point_weights, (signals, points))
    t = tiles or tiles_for("network_step", precision, width)
    block = max(16, triton.next_power_of_2(width))
    needed = programs * (weights.hidden + 1) * 2 * t.points * block
    if scratch.numel() < needed or scratch.dtype != weights.w.dtype:
        got = f"{scratch.numel()} of {scratch.dtype}"
        raise wrong("scratch", f"{needed} of {weights.w.dtype}", got, "Ask scratch_size.")
    check_same_device(x=x, values=values, scale=scale, sums=sums, scratch=scratch, point_weights=point_weights)
    if sums.numel() == 0:
        return
    share = cdiv(cdiv(max(points, 1), splits), t.points) * t.points
    weighting = values if point_weights is None else point_weights
    network_step_kernel[(programs,)](
        x,
        weights.first_w,
        weights.first_b,
        weights.w,
        weights.b,
        weights.head_w,
        weights.head_b,
        values,
        scale,
        weighting,
        sums,
        gradients.first_w,
        gradients.first_b,
        gradients.w,
        gradients.b,
        gradients.head_w,
        gradients.head_b,
        scratch,
        networks,
        splits,
        points,
        share,
        weights.hidden,
        outputs,
        channels,
        signals // networks,
        *x.stride(),
        weights.stride_w,
        weights.stride_b,
        gradients.stride_w,
        gradients.stride_b,
        *values.stride(),
        *weighting.stride()[:2],
        HAS_WEIGHTS=point_weights is not None,
        FIRST=x.shape[1],
        WIDTH=width,
        BLOCK_P=t.points,
        BLOCK_C=max(16, triton.next_power_of_2(outputs)),
        BLOCK_H=block,
        CHUNK=min(t.inputs, block),
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages),
    )


def _check_weights(weights: Weights) -> tuple[int, int, int]:
    """(networks, outputs, width)"""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    check_tensor("head_w", weights.head_w, (None, None, None), floats, contiguous=True)
    networks, outputs, width = weights.head_w.shape
    check_tensor("first_w", weights.first_w, (networks, width, None), contiguous=True)
    check_tensor("first_b", weights.first_b, (networks, width), contiguous=True)
    check_tensor("head_b", weights.head_b, (networks, outputs), contiguous=True)
    if weights.hidden:
        check_tensor("w", weights.w, (networks, width, width), floats, contiguous=True)
        check_tensor("b", weights.b, (networks, width), contiguous=True)
    if outputs > MOST_COLUMNS or weights.first_w.shape[2] > FEW_INPUTS:
        got = f"{outputs} and {weights.first_w.shape[2]}"
        raise wrong("weights", f"at most {MOST_COLUMNS} columns and {FEW_INPUTS} coordinates", got, "Run by layers.")
    return networks, outputs, width

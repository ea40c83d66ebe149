"""Linear heads with their loss: N heads as one product, residual, error sums and all gradients in the same pass.

A column of the product is one channel of one signal: column j of network n belongs to signal n * heads + j // channels.
Heads that share their features (STRAINER: one network, N heads) and independent networks (N networks, a head each) are
the same kernel with other strides.

`heads_kernel` does everything for up to MOST_COLUMNS columns: a program owns a share of the points, keeps the head
gradients in registers, and writes dz of the last sine layer; predictions never reach memory. For more columns
`residual_kernel` writes the residuals, which are small, and the products of layers.py take them from there.

    h [rows, H] --(W^T)--> prediction - target = r  --> sum of r^2
                                |            g = scale * weight * r
                                +--(W)--> dh * cos(z) = dz [rows, H];   dW = g^T h,  db = sum g
"""

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
from .configs import supports, tiles_for
from .heads_kernels import heads_kernel, losses_kernel, residual_kernel
from .tiles import Tiles

MOST_COLUMNS = 32
"""Columns whose gradients fit a program's registers beside the rest; docs/aot.md has the counts."""


def heads_splits(rows: int, networks: int, columns: int, width: int, precision: str, fused: bool = True) -> int:
    """Rows S of the partial sums that `launch_heads_loss` (or `launch_residual`) needs; the same every time."""
    if not fused:
        return max(1, cdiv(rows, tiles_for("forward", precision, width).points))
    blocks = cdiv(rows, tiles_for("heads", precision, width, columns=columns).points)
    return max(1, min(blocks, current_chip().processors // max(networks, 1)))


def fuses(columns: int, width: int, precision: str) -> bool:
    """Whether one kernel does loss and gradients, or residuals go through memory."""
    return supports("heads", precision, width, columns=columns)


def launch_heads_loss(
    h: Tensor,  # [N, rows, H], last axis contiguous: rows beyond the points may hold anything finite
    w: Tensor,  # [N, heads * C, H], last axis contiguous
    b: Tensor,  # [N, heads * C] float32, contiguous
    values: Tensor,  # [N * heads, P, C] float32, any strides
    scale: Tensor,  # [N * heads] float32: of the gradients
    sums: Tensor,  # [S, N, heads * C] float32, contiguous; overwritten: weighted squares, summed
    *,
    point_weights: Tensor | None = None,  # [N * heads, P] float32, any strides
    cosine: Tensor | None = None,  # like h: derivative of the last sine layer
    dz: Tensor | None = None,  # like h; overwritten: gradient by the argument of the last sine layer
    dw: Tensor | None = None,  # [S, N, heads * C, H] float32, contiguous; overwritten
    db: Tensor | None = None,  # [S, N, heads * C] float32, contiguous; overwritten
    add: bool = False,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """Error sums of linear heads, and the gradients of sum_n scale_n / 2 * (sum of squares of signal n).

    Args:
        dz, dw, db: left out where not wanted; dz needs the cosine, dw and db go together.
        add: add to sums, dw and db instead of overwriting them.
        precision, tiles: as in `layers.launch_forward`.

    Raises ValueError for tensors that do not belong together, or more than MOST_COLUMNS columns (see
    `launch_residual`).
    """
    networks, rows, width = h.shape
    check_precision(precision)
    check_networks(networks)
    splits, columns = sums.shape[0], w.shape[1]
    heads, channels = _check_heads(h, w, b, values, scale, sums, point_weights)
    if columns > MOST_COLUMNS:
        raise wrong("w", f"at most {MOST_COLUMNS} columns", columns, "Use launch_residual and the layers' gradients.")
    if (dz is None) != (cosine is None) or (dw is None) != (db is None):
        raise wrong("dz, cosine, dw, db", "dz with cosine, dw with db", "one without the other", "Pass both.")
    for name, tensor in (("dz", dz), ("cosine", cosine)):
        if tensor is not None:
            check_tensor(name, tensor, h.shape, (h.dtype,), rows=True)
    if dw is not None and db is not None:
        check_tensor("dw", dw, (splits, networks, columns, width), contiguous=True)
        check_tensor("db", db, (splits, networks, columns), contiguous=True)
    check_same_device(h=h, dz=dz, cosine=cosine, dw=dw, db=db)
    if sums.numel() == 0:
        return
    t = tiles or tiles_for("heads", precision, width, columns=columns)
    share = cdiv(cdiv(max(rows, 1), splits), t.points) * t.points
    weights = values if point_weights is None else point_weights
    block_h = max(16, triton.next_power_of_2(width))
    heads_kernel[(splits, networks)](
        h,
        h if cosine is None else cosine,
        w,
        b,
        values,
        scale,
        weights,
        sums,
        h if dz is None else dz,
        sums if dw is None else dw,
        sums if db is None else db,
        networks,
        rows,
        values.shape[1],
        width,
        columns,
        channels,
        heads,
        share,
        *h.stride()[:2],
        *(h if cosine is None else cosine).stride()[:2],
        *(h if dz is None else dz).stride()[:2],
        *w.stride()[:2],
        *values.stride(),
        *weights.stride()[:2],
        HAS_WEIGHTS=point_weights is not None,
        WANT_DZ=dz is not None,
        WANT_DW=dw is not None,
        ADD=add,
        EVEN=rows % t.points == 0 and width == block_h,
        BLOCK_P=t.points,
        BLOCK_C=max(16, triton.next_power_of_2(columns)),
        BLOCK_H=block_h,
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages, alone=True),
    )


def launch_residual(
    h: Tensor,  # as in launch_heads_loss
    w: Tensor,
    b: Tensor,
    values: Tensor,
    scale: Tensor,
    sums: Tensor,  # [S, N, heads * C], S blocks of rows; overwritten
    g: Tensor,  # [N, rows, at least heads * C], last axis contiguous; overwritten, zero in further columns
    *,
    point_weights: Tensor | None = None,
    add: bool = False,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """Error sums of any number of heads, and their scaled residuals as the operand g of further products.

    Raises ValueError for tensors that do not belong together.
    """
    networks, rows, width = h.shape
    check_precision(precision)
    check_networks(networks)
    columns = w.shape[1]
    heads, channels = _check_heads(h, w, b, values, scale, sums, point_weights)
    check_tensor("g", g, (networks, rows, None), (torch.float32, torch.float16, torch.bfloat16), rows=True)
    check_same_device(h=h, g=g)
    t = tiles or tiles_for("forward", precision, width)  # as heads_splits
    blocks = cdiv(rows, t.points)
    if g.shape[2] < columns or sums.shape[0] < blocks:
        got = f"{list(g.shape)} and {list(sums.shape)}"
        raise wrong("g and sums", f"{columns} columns and {blocks} blocks of rows", got, "Ask heads_splits.")
    if sums.numel() == 0:
        return
    weights = values if point_weights is None else point_weights
    block_o = min(t.outputs, max(16, triton.next_power_of_2(g.shape[2])))  # columns are few beside a layer's units
    residual_kernel[(blocks, cdiv(g.shape[2], block_o), networks)](
        h,
        w,
        b,
        values,
        scale,
        weights,
        sums,
        g,
        networks,
        rows,
        values.shape[1],
        width,
        columns,
        channels,
        heads,
        g.shape[2],
        *h.stride()[:2],
        *g.stride()[:2],
        *w.stride()[:2],
        *values.stride(),
        *weights.stride()[:2],
        HAS_WEIGHTS=point_weights is not None,
        ADD=add,
        BLOCK_P=t.points,
        BLOCK_O=block_o,
        BLOCK_K=t.inputs,
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages),
    )


LOSS_SPLITS = 64
"""Partial sums of a loss that are added at once."""


def launch_losses(
    sums: Tensor,  # [S, N, C] float32, contiguous
    norm: Tensor,  # [signals] float32: what each sum is divided by
    losses: Tensor,  # [signals] float32; overwritten
    bad: Tensor | None = None,  # [groups] int32: set to 1 where a loss is not finite
) -> None:
    """Losses from their partial sums, in a fixed order; signals are columns of C channels, network by network.

    optim.launch_reduce does the same beside gradients.

    Raises ValueError for tensors that do not belong together.
    """
    signals, channels = losses.shape[0], check_losses(sums, norm, losses, bad)
    if signals == 0:
        return
    losses_kernel[(signals,)](
        sums,
        norm,
        losses,
        losses if bad is None else bad,
        sums.shape[0],
        sums.shape[1] * sums.shape[2],
        channels,
        1 if bad is None else signals // bad.shape[0],
        FLAG=bad is not None,
        BLOCK_S=LOSS_SPLITS,
        BLOCK_C=triton.next_power_of_2(channels),
    )


def check_losses(sums: Tensor, norm: Tensor, losses: Tensor, bad: Tensor | None) -> int:
    """Channels of a signal, for tensors as `launch_losses` takes them.

    Raises ValueError for tensors that do not belong together.
    """
    signals = losses.shape[0]
    check_tensor("sums", sums, (None, None, None), contiguous=True)
    check_tensor("norm", norm, (signals,), contiguous=True)
    check_tensor("losses", losses, (signals,), contiguous=True)
    columns = sums.shape[1] * sums.shape[2]
    if signals and (columns % signals or (bad is not None and signals % bad.shape[0])):
        got = f"{list(sums.shape)} for {signals}"
        raise wrong("sums", "a whole number of channels per signal", got, "See the launcher's docstring.")
    if bad is not None:
        check_tensor("bad", bad, (None,), (torch.int32,), contiguous=True)
    check_same_device(sums=sums, norm=norm, losses=losses, bad=bad)
    return columns // max(signals, 1)


def _check_heads(
    h: Tensor, w: Tensor, b: Tensor, values: Tensor, scale: Tensor, sums: Tensor, point_weights: Tensor | None
) -> tuple[int, int]:
    """(heads per network, channels)"""
    floats = (torch.float32, torch.float16, torch.bfloat16)
    check_tensor("h", h, (None, None, None), floats, rows=True)
    networks, rows, width = h.shape
    check_tensor("w", w, (networks, None, width), floats, rows=True)
    columns = w.shape[1]
    check_tensor("b", b, (networks, columns), contiguous=True)
    check_tensor("values", values, (None, None, None))
    signals, points, channels = values.shape
    if points > rows or signals * channels != networks * columns:
        got = f"{list(values.shape)} for {networks} networks of {columns} columns and {rows} rows"
        raise wrong("values", "a signal per head, a channel per column", got, "See the launcher's docstring.")
    check_tensor("scale", scale, (signals,), contiguous=True)
    check_tensor("sums", sums, (None, networks, columns), contiguous=True)
    if point_weights is not None:
        check_tensor("point_weights", point_weights, (signals, points))
    check_same_device(h=h, w=w, b=b, values=values, scale=scale, sums=sums, point_weights=point_weights)
    return signals // max(networks, 1), channels

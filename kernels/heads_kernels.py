"""The device code behind heads.py, which says how it works."""

import triton
import triton.language as tl

from .mm import mm, to_operand
from .pieces import load, store


@triton.jit
def residual(
    prediction,  # [BLOCK_P, BLOCK_C]
    target_ptr,
    scale_ptr,
    weight_ptr,
    rows,
    columns,
    network,
    points,
    outputs,
    channels,
    heads,
    stride_tn,
    stride_tp,
    stride_tc,
    stride_pn,
    stride_pp,
    HAS_WEIGHTS: tl.constexpr,
):
    """(weighted r^2, gradient of the scaled loss by the prediction), zero outside of the points and columns."""
    mask = (rows < points)[:, None] & (columns < outputs)[None, :]
    signal = network * heads + columns // channels
    target_at = signal * stride_tn + (columns % channels) * stride_tc
    r = prediction - tl.load(target_ptr + rows[:, None] * stride_tp + target_at[None, :], mask=mask, other=0.0)
    r = tl.where(mask, r, 0.0)
    weighted = r
    if HAS_WEIGHTS:
        weight_at = rows[:, None] * stride_pp + (signal * stride_pn)[None, :]
        weighted = r * tl.load(weight_ptr + weight_at, mask=mask, other=0.0)
    scale = tl.load(scale_ptr + signal, mask=columns < outputs, other=0.0)
    return weighted * r, weighted * scale[None, :]


@triton.jit(do_not_specialize=["networks"])  # it changes as networks leave a stack
def heads_kernel(
    h_ptr,  # [N, rows, H], last axis contiguous
    cosine_ptr,  # like h
    w_ptr,  # [N, outputs, H], last axis contiguous
    b_ptr,  # [N, outputs] float32
    target_ptr,  # [signals, points, channels] by strides
    scale_ptr,  # [signals]
    weight_ptr,  # [signals, points] by strides, unused without HAS_WEIGHTS
    loss_ptr,  # [S, N, outputs]
    dz_ptr,  # like h
    dw_ptr,  # [S, N, outputs, H]
    db_ptr,  # [S, N, outputs]
    networks,
    rows_h,
    points,
    width,
    outputs,
    channels,
    heads,
    rows_per_split,
    stride_hn,
    stride_hp,
    stride_cn,
    stride_cp,
    stride_dn,
    stride_dp,
    stride_wn,
    stride_wo,
    stride_tn,
    stride_tp,
    stride_tc,
    stride_pn,
    stride_pp,
    HAS_WEIGHTS: tl.constexpr,
    WANT_DZ: tl.constexpr,
    WANT_DW: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    split, network = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    columns, units = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_H)
    column_mask, unit_mask = columns < outputs, units < width
    w = tl.load(  # transposed: [BLOCK_H, BLOCK_C]
        w_ptr + network * stride_wn + columns[None, :] * stride_wo + units[:, None],
        mask=unit_mask[:, None] & column_mask[None, :],
        other=0.0,
    )
    bias = tl.load(b_ptr + network * outputs + columns, mask=column_mask, other=0.0)
    loss = tl.zeros([BLOCK_C], tl.float32)
    db = tl.zeros([BLOCK_C], tl.float32)
    dw = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows_h)
    for first in range(0, end - begin, BLOCK_P):
        rows = begin + first + tl.arange(0, BLOCK_P)
        mask = (rows < end)[:, None] & unit_mask[None, :]
        h = load(h_ptr + network * stride_hn + rows[:, None] * stride_hp + units[None, :], mask, EVEN)
        prediction = mm(h, w, tl.zeros([BLOCK_P, BLOCK_C], tl.float32), PRECISION, TARGET) + bias[None, :]
        square, gradient = residual(
            prediction,
            target_ptr,
            scale_ptr,
            weight_ptr,
            rows,
            columns,
            network,
            points,
            outputs,
            channels,
            heads,
            stride_tn,
            stride_tp,
            stride_tc,
            stride_pn,
            stride_pp,
            HAS_WEIGHTS,
        )
        loss += tl.sum(square, axis=0)
        g = to_operand(gradient, PRECISION, TARGET)
        if WANT_DW:
            db += tl.sum(gradient, axis=0)
            dw = mm(tl.trans(h), g, dw, PRECISION, TARGET)
        if WANT_DZ:
            dh = mm(g, tl.trans(w), tl.zeros([BLOCK_P, BLOCK_H], tl.float32), PRECISION, TARGET)
            cosine = load(cosine_ptr + network * stride_cn + rows[:, None] * stride_cp + units[None, :], mask, EVEN)
            dz = to_operand(dh * cosine.to(tl.float32), PRECISION, TARGET)
            store(dz_ptr + network * stride_dn + rows[:, None] * stride_dp + units[None, :], dz, mask, EVEN)
    # Long sums in scalars only: per-lane addresses of 32 bits take half the registers.
    own = (split * networks + network) * outputs
    loss_ptr += own
    if ADD:
        loss += tl.load(loss_ptr + columns, mask=column_mask, other=0.0)
    tl.store(loss_ptr + columns, loss, mask=column_mask)
    if WANT_DW:
        db_ptr += own
        dw_at = dw_ptr + own * width + columns[None, :] * width + units[:, None]
        dw_mask = unit_mask[:, None] & column_mask[None, :]
        if ADD:
            db += tl.load(db_ptr + columns, mask=column_mask, other=0.0)
            dw += tl.load(dw_at, mask=dw_mask, other=0.0)
        tl.store(db_ptr + columns, db, mask=column_mask)
        tl.store(dw_at, dw, mask=dw_mask)


@triton.jit(do_not_specialize=["networks"])  # it changes as networks leave a stack
def residual_kernel(
    h_ptr,  # [N, rows, H], last axis contiguous
    w_ptr,  # [N, outputs, H], last axis contiguous
    b_ptr,  # [N, outputs] float32
    target_ptr,  # [signals, points, channels] by strides
    scale_ptr,  # [signals]
    weight_ptr,  # [signals, points] by strides, unused without HAS_WEIGHTS
    loss_ptr,  # [S, N, outputs]: S is the number of blocks of rows
    g_ptr,  # [N, rows, >= outputs], last axis contiguous; columns beyond outputs are set to 0
    networks,
    rows_h,
    points,
    width,
    outputs,
    channels,
    heads,
    stored,  # columns of g
    stride_hn,
    stride_hp,
    stride_gn,
    stride_gp,
    stride_wn,
    stride_wo,
    stride_tn,
    stride_tp,
    stride_tc,
    stride_pn,
    stride_pp,
    HAS_WEIGHTS: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """g and the error sums of a tile of points and columns."""
    block, network = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows = block * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask, column_mask = rows < rows_h, columns < outputs
    prediction = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    ks = tl.arange(0, BLOCK_K)
    for start in range(0, width, BLOCK_K):
        k_mask = start + ks < width
        h_at = network * stride_hn + rows[:, None] * stride_hp + (start + ks)[None, :]
        h = tl.load(h_ptr + h_at, mask=row_mask[:, None] & k_mask[None, :], other=0.0)
        w_at = network * stride_wn + columns[None, :] * stride_wo + (start + ks)[:, None]
        w = tl.load(w_ptr + w_at, mask=k_mask[:, None] & column_mask[None, :], other=0.0)
        prediction = mm(h, w, prediction, PRECISION, TARGET)
    prediction += tl.load(b_ptr + network * outputs + columns, mask=column_mask, other=0.0)[None, :]
    square, gradient = residual(
        prediction,
        target_ptr,
        scale_ptr,
        weight_ptr,
        rows,
        columns,
        network,
        points,
        outputs,
        channels,
        heads,
        stride_tn,
        stride_tp,
        stride_tc,
        stride_pn,
        stride_pp,
        HAS_WEIGHTS,
    )
    g = to_operand(gradient, PRECISION, TARGET).to(g_ptr.dtype.element_ty)
    g_at = network * stride_gn + rows[:, None] * stride_gp + columns[None, :]
    tl.store(g_ptr + g_at, g, mask=row_mask[:, None] & (columns < stored)[None, :])
    at = (block * networks + network) * outputs + columns
    loss = tl.sum(square, axis=0)
    if ADD:
        loss += tl.load(loss_ptr + at, mask=column_mask, other=0.0)
    tl.store(loss_ptr + at, loss, mask=column_mask)


@triton.jit
def store_loss(
    signal,
    sums_ptr,  # [S, N, outputs]
    norm_ptr,  # [signals]
    losses_ptr,  # [signals]
    bad_ptr,  # [groups] int32, unused without FLAG
    splits,
    stride_s,  # N * outputs
    channels,
    signals_per_group,
    FLAG: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """losses[signal] = its sums over splits and channels, in a fixed order, divided by its norm."""
    cs = tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
    for start in range(0, splits, BLOCK_S):
        ss = start + tl.arange(0, BLOCK_S)
        at = ss[:, None].to(tl.int64) * stride_s + signal * channels + cs[None, :]
        total += tl.load(sums_ptr + at, mask=(ss < splits)[:, None] & (cs < channels)[None, :], other=0.0)
    loss = tl.sum(tl.sum(total, axis=1), axis=0) / tl.load(norm_ptr + signal)
    tl.store(losses_ptr + signal, loss)
    if FLAG:
        # A non-finite number minus itself is not zero.
        if loss - loss != 0.0:
            tl.atomic_max(bad_ptr + signal // signals_per_group, 1)


@triton.jit
def losses_kernel(
    sums_ptr,
    norm_ptr,
    losses_ptr,
    bad_ptr,
    splits,
    stride_s,
    channels,
    signals_per_group,
    FLAG: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """`store_loss` for each signal."""
    store_loss(
        tl.program_id(0), sums_ptr, norm_ptr, losses_ptr, bad_ptr, splits, stride_s, channels, signals_per_group, FLAG,
        BLOCK_S, BLOCK_C,
    )  # fmt: skip

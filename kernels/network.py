"""A whole sine network on chip: all layers of a tile of points in one kernel, for one network or a stack of them.

For narrow networks a layer at a time would mean more launches than work. Here a program takes a tile of points through
all layers; activations stay in registers, weights come from the caches.

    forward:   coordinates -> h1 -> ... -> values                                       one program per tile of points
    training:  the same; then residual, loss, and the chain back. A program owns whole shares of the points (its partial
               sums) and a scratch of one tile's h and c per layer, which never leaves the second-level cache.

The sine layers are equally wide, the first takes up to FEW_INPUTS coordinates. Weights are padded operands with omega
folded in, as siren.Pipeline keeps them: one stride leads from a hidden layer to the next.
"""

import triton
import triton.language as tl

from .heads_kernels import residual
from .mm import mm, to_operand
from .pieces import first_layer, load
from .trig import sincos


@triton.jit
def _hidden(
    h,
    w_ptr,  # of this layer and network, [width, width]
    b_ptr,  # [width]
    units,
    unit_mask,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The sine's argument of a hidden layer."""
    at = w_ptr + units[None, :] * WIDTH + units[:, None]  # transposed: [in, out]
    w = load(at, unit_mask[:, None] & unit_mask[None, :], WIDTH == BLOCK_H)
    z = mm(h, w, tl.zeros([BLOCK_P, BLOCK_H], tl.float32), PRECISION, TARGET)
    return z + tl.load(b_ptr + units, mask=unit_mask, other=0.0)[None, :]


@triton.jit
def network_forward_kernel(
    x_ptr,  # [P, FIRST] or [N, P, FIRST] by strides
    first_w_ptr,  # [N, width, FIRST] float32
    first_b_ptr,  # [N, width] float32
    w_ptr,  # [hidden][N, width, width]
    b_ptr,  # [hidden][N, width] float32
    head_w_ptr,  # [N, channels, width]
    head_b_ptr,  # [N, channels] float32
    y_ptr,  # [N, P, channels] float32, contiguous
    points,
    hidden,  # layers after the first, without the head
    channels,
    stride_xn,
    stride_xp,
    stride_xk,
    stride_w,  # from a hidden layer to the next
    stride_b,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,  # a constant, so that addresses are: registers
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    network = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    units, columns = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C)
    unit_mask, column_mask, row_mask = units < WIDTH, columns < channels, rows < points
    z = first_layer(
        x_ptr + network * stride_xn,
        first_w_ptr + network * WIDTH * FIRST,
        first_b_ptr + network * WIDTH,
        rows,
        row_mask,
        units,
        unit_mask,
        stride_xp,
        stride_xk,
        FIRST,
        1,
        True,
        FIRST,
        BLOCK_P,
        BLOCK_H,
    )
    sine, _ = sincos(z, PRECISION, TARGET)
    h = to_operand(sine, PRECISION, TARGET)
    w_ptr += network * WIDTH * WIDTH
    b_ptr += network * WIDTH
    for index in range(hidden):
        layer = index + network * 0  # loop counters are 32 bits, or Python's under the interpreter
        z = _hidden(
            h, w_ptr + layer * stride_w, b_ptr + layer * stride_b, units, unit_mask, WIDTH, BLOCK_P, BLOCK_H, PRECISION,
            TARGET,
        )  # fmt: skip
        sine, _ = sincos(z, PRECISION, TARGET)
        h = to_operand(sine, PRECISION, TARGET)
    w = tl.load(  # transposed: [width, channels]
        head_w_ptr + network * channels * WIDTH + columns[None, :] * WIDTH + units[:, None],
        mask=unit_mask[:, None] & column_mask[None, :],
        other=0.0,
    )
    y = mm(h, w, tl.zeros([BLOCK_P, BLOCK_C], tl.float32), PRECISION, TARGET)
    y += tl.load(head_b_ptr + network * channels + columns, mask=column_mask, other=0.0)[None, :]
    at = (network * points + rows[:, None]) * channels + columns[None, :]
    tl.store(y_ptr + at, y, mask=row_mask[:, None] & column_mask[None, :])


@triton.jit(do_not_specialize=["networks", "splits"])  # they change as networks leave a stack
def network_step_kernel(
    x_ptr,  # [P, FIRST] by strides, shared by all networks
    first_w_ptr,  # as in the forward kernel
    first_b_ptr,
    w_ptr,
    b_ptr,
    head_w_ptr,  # [N, outputs, width]
    head_b_ptr,
    target_ptr,  # [signals, P, channels] by strides
    scale_ptr,  # [signals]
    weight_ptr,  # [signals, P] by strides, unused without HAS_WEIGHTS
    loss_ptr,  # [S, N, outputs]
    first_dw_ptr,  # [S, N, width, FIRST]
    first_db_ptr,  # [S, N, width]
    dw_ptr,  # [hidden][S, N, width, width]
    db_ptr,  # [hidden][S, N, width]
    head_dw_ptr,  # [S, N, outputs, width]
    head_db_ptr,  # [S, N, outputs]
    scratch_ptr,  # [programs, hidden + 1, 2, BLOCK_P, BLOCK_H] operands
    networks,
    splits,
    points,
    rows_per_split,
    hidden,
    outputs,
    channels,
    heads,
    stride_xp,
    stride_xk,
    stride_w,
    stride_b,
    stride_dw,
    stride_db,
    stride_tn,
    stride_tp,
    stride_tc,
    stride_pn,
    stride_pp,
    HAS_WEIGHTS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,  # a constant, so that addresses are: registers
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    units, columns, lanes = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    unit_mask, column_mask = units < WIDTH, columns < outputs
    inner_mask = unit_mask[:, None] & unit_mask[None, :]
    tile_at = lanes[:, None] * BLOCK_H + units[None, :]
    tile_size: tl.constexpr = BLOCK_P * BLOCK_H
    program = tl.program_id(0).to(tl.int64)
    scratch_ptr += program * (hidden + 1) * 2 * tile_size
    for turn in range(tl.cdiv(networks * splits - tl.program_id(0), tl.num_programs(0))):
        which = program + turn * tl.num_programs(0)  # split * networks + network
        network, split = which % networks, which // networks
        own_w, own_b = w_ptr + network * WIDTH * WIDTH, b_ptr + network * WIDTH
        own_dw, own_db = dw_ptr + which * WIDTH * WIDTH, db_ptr + which * WIDTH
        head_w = tl.load(  # transposed: [width, outputs]
            head_w_ptr + network * outputs * WIDTH + columns[None, :] * WIDTH + units[:, None],
            mask=unit_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        head_b = tl.load(head_b_ptr + network * outputs + columns, mask=column_mask, other=0.0)
        loss = tl.zeros([BLOCK_C], tl.float32)
        head_dw = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
        head_db = tl.zeros([BLOCK_C], tl.float32)
        first_db = tl.zeros([BLOCK_H], tl.float32)
        first_dw = tl.zeros([BLOCK_H, 4], tl.float32)
        begin = split * rows_per_split
        end = tl.minimum(begin + rows_per_split, points)
        # A share without points writes zeros, so one round at least.
        for start in range(0, tl.maximum(end - begin, 1), BLOCK_P):
            # Long sums in scalars only: per-lane addresses of 32 bits take half the registers.
            first_row = begin + start
            later = tl.zeros([BLOCK_H], tl.int32) + start > 0  # a tile came before this one
            left = (end - first_row).to(tl.int32)
            row_mask = lanes < left
            x_tile = x_ptr + first_row * stride_xp
            z = first_layer(
                x_tile,
                first_w_ptr + network * WIDTH * FIRST,
                first_b_ptr + network * WIDTH,
                lanes,
                row_mask,
                units,
                unit_mask,
                stride_xp,
                stride_xk,
                FIRST,
                1,
                True,
                FIRST,
                BLOCK_P,
                BLOCK_H,
            )
            sine, cosine = sincos(z, PRECISION, TARGET)
            h = to_operand(sine, PRECISION, TARGET)
            tl.store(scratch_ptr + tile_at, h)
            tl.store(scratch_ptr + tile_size + tile_at, to_operand(cosine, PRECISION, TARGET))
            for index in range(hidden):
                layer = index + program * 0  # loop counters are 32 bits, or Python's under the interpreter
                z = _hidden(
                    h, own_w + layer * stride_w, own_b + layer * stride_b, units, unit_mask, WIDTH, BLOCK_P, BLOCK_H,
                    PRECISION, TARGET,
                )  # fmt: skip
                sine, cosine = sincos(z, PRECISION, TARGET)
                h = to_operand(sine, PRECISION, TARGET)
                saved = scratch_ptr + (layer + 1) * 2 * tile_size + tile_at
                tl.store(saved, h)
                tl.store(saved + tile_size, to_operand(cosine, PRECISION, TARGET))
            prediction = mm(h, head_w, tl.zeros([BLOCK_P, BLOCK_C], tl.float32), PRECISION, TARGET) + head_b[None, :]
            square, gradient = residual(
                prediction,
                target_ptr + first_row * stride_tp,
                scale_ptr,
                weight_ptr + first_row * stride_pp,
                lanes,
                columns,
                network,
                left,
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
            head_db += tl.sum(gradient, axis=0)
            g = to_operand(gradient, PRECISION, TARGET)
            head_dw = mm(tl.trans(h), g, head_dw, PRECISION, TARGET)
            dh = mm(g, tl.trans(head_w), tl.zeros([BLOCK_P, BLOCK_H], tl.float32), PRECISION, TARGET)
            # Other threads read the scratch than wrote it.
            tl.debug_barrier()
            for step in range(hidden):
                layer = hidden - 1 - step + program * 0
                saved = scratch_ptr + (layer + 1) * 2 * tile_size + tile_at
                dz = dh * tl.load(saved + tile_size).to(tl.float32)
                db_at = own_db + layer * stride_db + units
                db = tl.load(db_at, mask=unit_mask & later, other=0.0) + tl.sum(dz, axis=0)
                tl.store(db_at, db, mask=unit_mask)
                dz = to_operand(dz, PRECISION, TARGET)
                for chunk in range(0, BLOCK_H, CHUNK):  # some columns at a time: registers
                    ks = chunk + tl.arange(0, CHUNK)
                    dw_at = own_dw + layer * stride_dw + units[:, None] * WIDTH + ks[None, :]
                    dw_mask = unit_mask[:, None] & (ks < WIDTH)[None, :]
                    before = tl.load(scratch_ptr + layer * 2 * tile_size + lanes[:, None] * BLOCK_H + ks[None, :])
                    dw = tl.load(dw_at, mask=dw_mask & later[:, None], other=0.0)
                    tl.store(dw_at, mm(tl.trans(dz), before, dw, PRECISION, TARGET), mask=dw_mask)
                w_at = own_w + layer * stride_w + units[:, None] * WIDTH + units[None, :]
                w = load(w_at, inner_mask, WIDTH == BLOCK_H)
                dh = mm(dz, w, tl.zeros([BLOCK_P, BLOCK_H], tl.float32), PRECISION, TARGET)
            dz = dh * tl.load(scratch_ptr + tile_size + tile_at).to(tl.float32)
            first_db += tl.sum(dz, axis=0)
            for k in tl.static_range(FIRST):
                x = tl.load(x_tile + lanes * stride_xp + k * stride_xk, mask=row_mask, other=0.0).to(tl.float32)
                column = tl.sum(dz * x[:, None], axis=0)
                first_dw += tl.where((tl.arange(0, 4) == k)[None, :], column[:, None], 0.0)
            # The next tile overwrites the scratch, and adds to sums that others wrote.
            tl.debug_barrier()
        at = which * outputs + columns
        tl.store(loss_ptr + at, loss, mask=column_mask)
        tl.store(head_db_ptr + at, head_db, mask=column_mask)
        head_at = at[None, :] * WIDTH + units[:, None]
        tl.store(head_dw_ptr + head_at, head_dw, mask=unit_mask[:, None] & column_mask[None, :])
        tl.store(first_db_ptr + which * WIDTH + units, first_db, mask=unit_mask)
        first_at = (which * WIDTH + units[:, None]) * FIRST + tl.arange(0, 4)[None, :]
        tl.store(first_dw_ptr + first_at, first_dw, mask=unit_mask[:, None] & (tl.arange(0, 4) < FIRST)[None, :])

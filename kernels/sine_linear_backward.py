"""The gradients of sine_linear.py's layer, which says what the flags mean."""

import triton
import triton.language as tl

from .mm import mm, to_operand
from .pieces import chain_product, first_layer, load, tile_of
from .trig import sincos


@triton.jit
def slope_kernel(
    dy_ptr,  # [N, P, out] by strides
    z_ptr,  # [N, P, out] contiguous
    dz_ptr,  # [N, P, out] contiguous
    omega,
    points,
    outputs,
    stride_dn,
    stride_dp,
    stride_do,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """dz = omega cos(z) dy, the gradient of x W^T + b."""
    network = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = (rows < points)[:, None] & (columns < outputs)[None, :]
    at = network * points * outputs + rows[:, None] * outputs + columns[None, :]
    dy = tl.load(
        dy_ptr + network * stride_dn + rows[:, None] * stride_dp + columns[None, :] * stride_do, mask=mask, other=0.0
    )
    _, cosine = sincos(tl.load(z_ptr + at, mask=mask, other=0.0), PRECISION, TARGET)
    tl.store(dz_ptr + at, (omega * cosine * dy.to(tl.float32)).to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def input_gradient_kernel(
    dz_ptr,  # [N * SUMMED, rows, out], last axis contiguous
    w_ptr,  # [N * SUMMED, out, in] by strides
    cosine_ptr,  # [N, rows, in], last axis contiguous: of the layer before, unused without COSINE
    dx_ptr,  # [N, rows, in], last axis contiguous
    x_ptr,  # coordinates [N, rows_x, FIRST], unused without FIRST
    first_w_ptr,  # [N, in, FIRST]
    first_b_ptr,  # [N, in]
    summed,
    rows_x,
    rows_d,
    inputs,
    outputs,
    stride_dn,
    stride_dp,
    stride_wn,
    stride_wo,
    stride_wk,
    stride_cn,
    stride_cp,
    stride_on,
    stride_op,
    stride_xn,
    stride_xp,
    stride_xk,
    stride_fwn,
    stride_fwo,
    stride_fbn,
    HAS_COSINE: tl.constexpr,
    FIRST: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """dx = dz W, summed over `summed` networks that share x; with the cosine at once dz of the layer before.

    The cosine is one that the forward kernel stored (HAS_COSINE), or the first layer's, computed here (FIRST).
    """
    network = tl.program_id(1).to(tl.int64)
    row_block, column_block = tile_of(inputs, BLOCK_K)
    rows = row_block * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask, column_mask = rows < rows_d, columns < inputs
    sums = chain_product(
        dz_ptr + network * summed * stride_dn,
        w_ptr + network * summed * stride_wn,
        rows,
        row_mask,
        columns,
        column_mask,
        summed,
        outputs,
        stride_dn,
        stride_dp,
        stride_wn,
        stride_wo,
        stride_wk,
        EVEN,
        BLOCK_P,
        BLOCK_O,
        BLOCK_K,
        PRECISION,
        TARGET,
    )
    mask = row_mask[:, None] & column_mask[None, :]
    # Long sums in scalars only: per-lane addresses of 32 bits take half the registers.
    first_row = row_block * BLOCK_P
    lanes = tl.arange(0, BLOCK_P)
    if HAS_COSINE:
        cosine_ptr += network * stride_cn + first_row * stride_cp
        sums *= load(cosine_ptr + (lanes[:, None] * stride_cp + columns[None, :]), mask, EVEN).to(tl.float32)
    if FIRST > 0:
        z = first_layer(
            x_ptr + network * stride_xn,
            first_w_ptr + network * stride_fwn,
            first_b_ptr + network * stride_fbn,
            rows,
            rows < rows_x,
            columns,
            column_mask,
            stride_xp,
            stride_xk,
            stride_fwo,
            1,
            True,
            FIRST,
            BLOCK_P,
            BLOCK_K,
        )
        _, cosine = sincos(z, PRECISION, TARGET)
        sums *= cosine
    dx_ptr += network * stride_on + first_row * stride_op
    at = dx_ptr + (lanes[:, None] * stride_op + columns[None, :])
    if OPERAND:
        sums = to_operand(sums, PRECISION, TARGET)
    tl.store(at, sums.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _times_cosine(
    sums,  # [BLOCK_P, BLOCK_K]
    c_ptr,  # of this tile
    dz_ptr,
    stride,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """dz of a tile, stored as an operand."""
    # Long sums in scalars only: per-lane addresses of 32 bits take half the registers.
    tile = tl.arange(0, BLOCK_P)[:, None] * stride + tl.arange(0, BLOCK_K)[None, :]
    dz = to_operand(sums * tl.load(c_ptr + tile).to(tl.float32), PRECISION, TARGET)
    tl.store(dz_ptr + tile, dz.to(dz_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["layers"])
def gradient_chain_kernel(
    dz_ptr,  # [layers, N, rows, width], contiguous but for the first axis: the last is read, all others are written
    w_ptr,  # [layers, N, out, in] by strides
    c_ptr,  # [layers, N, rows, width], likewise
    layers,
    rows,
    stride_dl,
    stride_wl,
    stride_wn,
    stride_wo,
    stride_wk,
    stride_cl,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """dz of all hidden layers for one block of points, from the last one's: (dz W) * c of the layer before."""
    network = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_P
    own = network * rows * WIDTH
    dz_ptr += own
    c_ptr += own
    w_ptr += network * stride_wn
    lanes, columns = tl.arange(0, BLOCK_P), tl.arange(0, WIDTH)
    here = first_row * WIDTH
    for step in range(layers - 1):
        layer = layers - 1 - step + network * 0  # loop counters are 32 bits, or Python's under the interpreter
        sums = chain_product(
            dz_ptr + (layer * stride_dl + here), w_ptr + layer * stride_wl, lanes, lanes < BLOCK_P, columns,
            columns < WIDTH, 1, WIDTH, 0, WIDTH, 0, stride_wo, stride_wk, True, BLOCK_P, BLOCK_O, WIDTH, PRECISION,
            TARGET,
        )  # fmt: skip
        below = layer - 1
        c_at, dz_at = c_ptr + (below * stride_cl + here), dz_ptr + (below * stride_dl + here)
        if WIDTH == 256:  # one half after the other: all cosines at once would not fit the registers
            low, high = tl.split(tl.permute(tl.reshape(sums, [BLOCK_P, 2, 128]), (0, 2, 1)))
            _times_cosine(low, c_at, dz_at, WIDTH, BLOCK_P, 128, PRECISION, TARGET)
            _times_cosine(high, c_at + 128, dz_at + 128, WIDTH, BLOCK_P, 128, PRECISION, TARGET)
        else:
            _times_cosine(sums, c_at, dz_at, WIDTH, BLOCK_P, WIDTH, PRECISION, TARGET)
        # All threads have written the tile that all threads read next.
        tl.debug_barrier()


@triton.jit
def first_gradient_kernel(
    dz_ptr,  # [N * SUMMED, rows, out], last axis contiguous: of the second layer
    w_ptr,  # [N * SUMMED, out, in] by strides: of the second layer
    dw_ptr,  # [S, N, in, FIRST]: of the first layer; S is the number of blocks of rows
    db_ptr,  # [S, N, in]
    x_ptr,  # coordinates [N, rows_x, FIRST]
    first_w_ptr,  # [N, in, FIRST]
    first_b_ptr,  # [N, in]
    summed,
    rows_x,
    rows_d,
    inputs,
    outputs,
    stride_dn,
    stride_dp,
    stride_wn,
    stride_wo,
    stride_wk,
    stride_xn,
    stride_xp,
    stride_xk,
    stride_fwn,
    stride_fwo,
    stride_fbn,
    FIRST: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The first layer's weight gradients straight from the second layer's dz: its own dz never reaches memory."""
    network = tl.program_id(1).to(tl.int64)
    row_block, column_block = tile_of(inputs, BLOCK_K)
    rows = row_block * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = column_block * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask, column_mask = rows < rows_d, columns < inputs
    sums = chain_product(
        dz_ptr + network * summed * stride_dn,
        w_ptr + network * summed * stride_wn,
        rows,
        row_mask,
        columns,
        column_mask,
        summed,
        outputs,
        stride_dn,
        stride_dp,
        stride_wn,
        stride_wo,
        stride_wk,
        EVEN,
        BLOCK_P,
        BLOCK_O,
        BLOCK_K,
        PRECISION,
        TARGET,
    )
    x_ptr += network * stride_xn
    z = first_layer(
        x_ptr,
        first_w_ptr + network * stride_fwn,
        first_b_ptr + network * stride_fbn,
        rows,
        rows < rows_x,
        columns,
        column_mask,
        stride_xp,
        stride_xk,
        stride_fwo,
        1,
        True,
        FIRST,
        BLOCK_P,
        BLOCK_K,
    )
    _, cosine = sincos(z, PRECISION, TARGET)
    dz = sums * cosine  # zero beyond the points, as the second layer's is
    at = (row_block * tl.num_programs(1) + network) * inputs + columns
    db = tl.sum(dz, axis=0)
    if ADD:
        db += tl.load(db_ptr + at, mask=column_mask, other=0.0)
    tl.store(db_ptr + at, db, mask=column_mask)
    for k in tl.static_range(FIRST):
        x = tl.load(x_ptr + rows * stride_xp + k * stride_xk, mask=rows < rows_x, other=0.0).to(tl.float32)
        dw = tl.sum(dz * x[:, None], axis=0)
        if ADD:
            dw += tl.load(dw_ptr + at * FIRST + k, mask=column_mask, other=0.0)
        tl.store(dw_ptr + at * FIRST + k, dw, mask=column_mask)


@triton.jit(do_not_specialize=["networks"])  # it changes as networks leave a stack
def weight_gradient_kernel(
    dz_ptr,  # [L, N, rows, out], last axis contiguous
    x_ptr,  # [L, N, rows_x, in] by strides
    dw_ptr,  # [L, S, N, out, in]
    db_ptr,  # [L, S, N, out]
    networks,
    splits,
    rows_x,
    rows_d,
    inputs,
    outputs,
    rows_per_split,
    stride_dl,
    stride_dn,
    stride_dp,
    stride_xl,
    stride_xn,
    stride_xp,
    stride_xk,
    stride_wl,
    stride_bl,
    HAS_BIAS: tl.constexpr,
    FEW: tl.constexpr,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """dW = dz^T x and db = column sums of dz over one split of the points; added to what is there with ADD.

    L layers of one shape may share a launch: their programs fill the chip with fewer splits, so fewer partial sums.
    """
    program = tl.program_id(2).to(tl.int64)  # (layer * splits + split) * networks + network
    network, which = program % networks, program % (splits * networks)
    split, layer = which // networks, program // (splits * networks)
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    out_mask, k_mask = outs < outputs, ks < inputs
    dz_ptr += layer * stride_dl + network * stride_dn
    x_ptr += layer * stride_xl + network * stride_xn
    # Long sums in scalars only: per-lane addresses of 32 bits take half the registers.
    dw_ptr += layer * stride_wl + which * outputs * inputs
    if ADD:  # where the sums begin: at the end they would need as many registers again
        dw = load(
            dw_ptr + (outs[:, None] * inputs + ks[None, :]), out_mask[:, None] & k_mask[None, :], EVEN and FEW == 0
        )
    else:
        dw = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    # Summed along the points at the end only: across warps that takes barriers.
    db = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, rows_d)
    for first in range(0, end - begin, BLOCK_P):
        rows = begin + first + tl.arange(0, BLOCK_P)
        row_mask = rows < end
        dz = load(dz_ptr + rows[:, None] * stride_dp + outs[None, :], row_mask[:, None] & out_mask[None, :], EVEN)
        if HAS_BIAS:
            db += dz.to(tl.float32)
        if FEW > 0:
            for k in tl.static_range(FEW):
                at = x_ptr + rows * stride_xp + k * stride_xk
                x = tl.load(at, mask=row_mask & (rows < rows_x), other=0.0).to(tl.float32)
                column = tl.sum(dz.to(tl.float32) * x[:, None], axis=0)
                dw += tl.where((ks == k)[None, :], column[:, None], 0.0)
        else:
            x = load(
                x_ptr + rows[:, None] * stride_xp + ks[None, :] * stride_xk,
                (row_mask & (rows < rows_x))[:, None] & k_mask[None, :],
                EVEN,
            )
            dw = mm(tl.trans(dz), x, dw, PRECISION, TARGET)
    tl.store(dw_ptr + (outs[:, None] * inputs + ks[None, :]), dw, mask=out_mask[:, None] & k_mask[None, :])
    if HAS_BIAS:  # the same sums in every program along the inputs: the first one writes
        mask = out_mask & (tl.program_id(1) == 0)
        at = db_ptr + layer * stride_bl + which * outputs + outs
        sums = tl.sum(db, axis=0)
        if ADD:
            sums += tl.load(at, mask=mask, other=0.0)
        tl.store(at, sums, mask=mask)

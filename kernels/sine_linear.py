"""y = sin(omega (x W^T + b)) and its gradients, batched over N networks: Triton kernels.

Three kernels: the forward product with sine in the epilogue, dx = dz W with the cosine in the epilogue, and
dW = dz^T x with db, split over the points into partial sums that are added up in a fixed order. Layers with at most
FEW_INPUTS inputs (coordinates) use no matrix unit: a product that thin is cheaper as multiply-adds, always in float32.
Backwards the layer after such a one takes coordinates and computes the first layer's cosine tile by tile (FIRST).

Every tensor may have any strides but for a contiguous last axis where said; a stride of 0 over N shares it between
the networks. Products round their operands to PRECISION (see mm.py) and add in float32; the sine's argument is float32
always. OPERAND rounds what is stored as an operand of the next product. EVEN promises that no tile reaches over the end
of a tensor, which saves every mask but those of coordinates.
The launchers are in layers.py.
"""

import triton
import triton.language as tl

from .mm import mm, to_operand
from .pieces import load, store, tile_of
from .trig import sincos

NOTHING, ARGUMENT, COSINE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""What the forward kernel leaves for the backward one: nothing, z (float32), or cos(z)."""


@triton.jit
def _finish(
    z,  # [BLOCK_P, BLOCK_O]
    y_ptr,  # of this tile
    saved_ptr,
    rows,  # of the tile
    columns,
    stride_yp,
    stride_sp,
    SINE: tl.constexpr,
    SAVE: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The sine of a tile, and what is kept for the backward pass."""
    lanes, units = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_O)
    mask = (lanes < rows)[:, None] & (units < columns)[None, :]
    y_at = y_ptr + (lanes[:, None] * stride_yp + units[None, :])
    saved_at = saved_ptr + (lanes[:, None] * stride_sp + units[None, :])
    y = z
    if SINE:
        y, cosine = sincos(z, PRECISION, TARGET)
        if SAVE == COSINE:
            if OPERAND:
                cosine = to_operand(cosine, PRECISION, TARGET)
            store(saved_at, cosine, mask, EVEN)
    if SAVE == ARGUMENT:
        store(saved_at, z, mask, EVEN)
    if OPERAND:
        y = to_operand(y, PRECISION, TARGET)
    store(y_at, y, mask, EVEN)


@triton.jit
def _forward_tile(
    x_ptr,  # of this network
    w_ptr,
    b_ptr,
    y_ptr,
    saved_ptr,
    omega,
    row_block,
    column_block,
    rows_x,
    rows_y,
    inputs,
    outputs,
    stride_xp,
    stride_xk,
    stride_wo,
    stride_wk,
    stride_bo,
    stride_yp,
    stride_sp,
    HAS_BIAS: tl.constexpr,
    SINE: tl.constexpr,
    SAVE: tl.constexpr,
    FEW: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """One tile of a layer's outputs."""
    rows = row_block * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = column_block * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask, column_mask = rows < rows_x, columns < outputs
    if FEW > 0:
        z = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        for k in tl.static_range(FEW):
            x = tl.load(x_ptr + rows * stride_xp + k * stride_xk, mask=row_mask, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + columns * stride_wo + k * stride_wk, mask=column_mask, other=0.0).to(tl.float32)
            z = tl.fma(x[:, None], w[None, :], z)
    else:
        z = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
        ks = tl.arange(0, BLOCK_K)
        for start in range(0, inputs, BLOCK_K):
            k_mask = start + ks < inputs
            x = load(
                x_ptr + rows[:, None] * stride_xp + (start + ks)[None, :] * stride_xk,
                row_mask[:, None] & k_mask[None, :],
                EVEN,
            )
            w = load(
                w_ptr + (start + ks)[:, None] * stride_wk + columns[None, :] * stride_wo,
                k_mask[:, None] & column_mask[None, :],
                EVEN,
            )
            z = mm(x, w, z, PRECISION, TARGET)
    if HAS_BIAS:
        bias = tl.load(b_ptr + columns * stride_bo, mask=column_mask, other=0.0)
        z += bias.to(tl.float32)[None, :]
    z *= omega
    # Long sums in scalars only: per-lane addresses of 32 bits take half the registers.
    first_row, first_column = row_block * BLOCK_P, column_block * BLOCK_O
    y_ptr += first_row * stride_yp + first_column
    saved_ptr += first_row * stride_sp + first_column
    left_rows, left_columns = (rows_y - first_row).to(tl.int32), outputs - first_column
    if BLOCK_O == 256:
        # One half after the other: a sine and a cosine for each sum at once would not fit the registers.
        low, high = tl.split(tl.permute(tl.reshape(z, [BLOCK_P, 2, 128]), (0, 2, 1)))
        _finish(
            low, y_ptr, saved_ptr, left_rows, left_columns, stride_yp, stride_sp, SINE, SAVE, OPERAND, EVEN, BLOCK_P,
            128, PRECISION, TARGET,
        )  # fmt: skip
        _finish(
            high, y_ptr + 128, saved_ptr + 128, left_rows, left_columns - 128, stride_yp, stride_sp, SINE, SAVE,
            OPERAND, EVEN, BLOCK_P, 128, PRECISION, TARGET,
        )  # fmt: skip
    else:
        _finish(
            z, y_ptr, saved_ptr, left_rows, left_columns, stride_yp, stride_sp, SINE, SAVE, OPERAND, EVEN, BLOCK_P,
            BLOCK_O, PRECISION, TARGET,
        )  # fmt: skip


@triton.jit
def forward_kernel(
    x_ptr,  # [N, rows_x, in]
    w_ptr,  # [N, out, in]
    b_ptr,  # [N, out], unused without a bias
    y_ptr,  # [N, rows_y, out], last axis contiguous
    saved_ptr,  # the same shape, unused with SAVE = NOTHING
    omega,
    rows_x,
    rows_y,
    inputs,
    outputs,
    stride_xn,
    stride_xp,
    stride_xk,
    stride_wn,
    stride_wo,
    stride_wk,
    stride_bn,
    stride_bo,
    stride_yn,
    stride_yp,
    stride_sn,
    stride_sp,
    HAS_BIAS: tl.constexpr,
    SINE: tl.constexpr,
    SAVE: tl.constexpr,
    FEW: tl.constexpr,
    OPERAND: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """A layer."""
    network = tl.program_id(1).to(tl.int64)
    # Tiles of the same points run side by side: their input is read from memory once.
    row_block, column_block = tile_of(outputs, BLOCK_O)
    _forward_tile(
        x_ptr + network * stride_xn, w_ptr + network * stride_wn, b_ptr + network * stride_bn,
        y_ptr + network * stride_yn, saved_ptr + network * stride_sn, omega, row_block, column_block, rows_x, rows_y,
        inputs, outputs, stride_xp, stride_xk, stride_wo, stride_wk, stride_bo, stride_yp, stride_sp, HAS_BIAS, SINE,
        SAVE, FEW, OPERAND, EVEN, BLOCK_P, BLOCK_O, BLOCK_K, PRECISION, TARGET,
    )  # fmt: skip


@triton.jit(do_not_specialize=["layers"])
def forward_chain_kernel(
    x_ptr,  # coordinates [rows_x, FEW], or [N, rows_x, FEW]
    first_w_ptr,  # [N, width, FEW]
    first_b_ptr,  # [N, width]
    w_ptr,  # [layers, N, width, width], contiguous but for the first axis
    b_ptr,  # [layers, N, width], likewise
    h_ptr,  # [1 + layers, N, rows, width], likewise
    c_ptr,  # [layers, N, rows, width], likewise; unused with SAVE = NOTHING
    layers,
    rows_x,
    rows,
    stride_xn,
    stride_xp,
    stride_xk,
    stride_fwn,
    stride_fbn,
    stride_wl,
    stride_bl,
    stride_hl,
    stride_cl,
    SAVE: tl.constexpr,
    FEW: tl.constexpr,
    WIDTH: tl.constexpr,
    FIRST_BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """All sine layers for one block of points: what a layer leaves is in the caches when the next one reads it."""
    network = tl.program_id(1).to(tl.int64)
    row_block = tl.program_id(0).to(tl.int64)
    own = network * rows * WIDTH
    h_ptr += own
    c_ptr += own
    w_ptr += network * WIDTH * WIDTH
    b_ptr += network * WIDTH
    for block in tl.static_range(WIDTH // FIRST_BLOCK):  # narrow tiles: nothing is reused here
        _forward_tile(
            x_ptr + network * stride_xn, first_w_ptr + network * stride_fwn, first_b_ptr + network * stride_fbn, h_ptr,
            h_ptr, 1.0, row_block, block, rows_x, rows, FEW, WIDTH, stride_xp, stride_xk, FEW, 1, 1, WIDTH, WIDTH,
            True, True, NOTHING, FEW, True, True, BLOCK_P, FIRST_BLOCK, BLOCK_K, PRECISION, TARGET,
        )  # fmt: skip
    zero = network * 0  # loop counters are 32 bits, or Python's under the interpreter
    for layer in range(layers):
        # All threads have written the tile that all threads now read.
        tl.debug_barrier()
        at = layer + zero
        _forward_tile(
            h_ptr + at * stride_hl, w_ptr + at * stride_wl, b_ptr + at * stride_bl, h_ptr + (at + 1) * stride_hl,
            c_ptr + at * stride_cl, 1.0, row_block, 0, rows, rows, WIDTH, WIDTH, WIDTH, 1, WIDTH, 1, 1, WIDTH, WIDTH,
            True, True, SAVE, 0, True, True, BLOCK_P, WIDTH, BLOCK_K, PRECISION, TARGET,
        )  # fmt: skip

"""What several kernels do to a tile: load it, find it, the first layer's argument, the product that leads backwards."""

import triton
import triton.language as tl

from .mm import mm


@triton.jit
def load(pointers, mask, EVEN: tl.constexpr):
    """A tile, zero outside of the mask."""
    if EVEN:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def store(pointers, tile, mask, EVEN: tl.constexpr):
    """Write a tile, within the mask."""
    if EVEN:
        tl.store(pointers, tile.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, tile.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def tile_of(columns, BLOCK: tl.constexpr):
    """(block of rows, block of columns) of this program in a grid whose columns come first."""
    blocks = tl.cdiv(columns, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks


@triton.jit
def first_layer(
    x_ptr,  # coordinates of this network
    w_ptr,  # [units, FIRST] of this network, omega folded in
    b_ptr,  # [units] of this network, omega folded in
    rows,
    row_mask,
    units,
    unit_mask,
    stride_xp,
    stride_xk,
    stride_wo,
    stride_bo,
    HAS_BIAS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """The sine's argument for a tile of points and units, by multiply-adds in float32."""
    z = tl.zeros([BLOCK_P, BLOCK_U], tl.float32)
    if HAS_BIAS:
        z += tl.load(b_ptr + units * stride_bo, mask=unit_mask, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(FIRST):
        x = tl.load(x_ptr + rows * stride_xp + k * stride_xk, mask=row_mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + units * stride_wo + k, mask=unit_mask, other=0.0).to(tl.float32)
        z = tl.fma(x[:, None], w[None, :], z)
    return z


@triton.jit
def chain_product(
    dz_ptr,
    w_ptr,
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
    EVEN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """dz W for a tile of points and inputs, summed over `summed` networks."""
    sums = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    os = tl.arange(0, BLOCK_O)
    zero = tl.program_id(0).to(tl.int64) * 0  # loop counters are 32 bits, or Python's under the interpreter
    for member in range(summed):
        dz_of = dz_ptr + (member + zero) * stride_dn
        w_of = w_ptr + (member + zero) * stride_wn
        for start in range(0, outputs, BLOCK_O):
            o_mask = start + os < outputs
            dz = load(
                dz_of + rows[:, None] * stride_dp + (start + os)[None, :], row_mask[:, None] & o_mask[None, :], EVEN
            )
            w = load(
                w_of + (start + os)[:, None] * stride_wo + columns[None, :] * stride_wk,
                o_mask[:, None] & column_mask[None, :],
                EVEN,
            )
            sums = mm(dz, w, sums, PRECISION, TARGET)
    return sums

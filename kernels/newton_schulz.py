"""Muon's orthogonalisation of stacks of matrices by Newton and Schulz's iteration, batched, N = 1 included."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import cdiv, check_precision, check_same_device, check_size, check_tensor, launch_options, wrong
from .chip import current_chip
from .mm import mm, to_operand
from .segments import DTYPES

_SQUARES_BLOCK = 4096


@triton.jit
def _squares_kernel(x_ptr, parts_ptr, size, parts, BLOCK: tl.constexpr):
    """Sums of squares of blocks of each matrix: x [N, size] -> [N, parts]."""
    program = tl.program_id(0)
    offsets = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (program // parts).to(tl.int64) * size + offsets, mask=offsets < size, other=0.0)
    tl.store(parts_ptr + program, tl.sum(x * x, axis=0))


@triton.jit
def _normalise_kernel(
    x_ptr,  # [N, size]
    parts_ptr,  # [N, parts]
    y_ptr,  # [N, size]
    size,
    parts,
    eps,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """y = x / (Frobenius norm + eps)."""
    program = tl.program_id(0)
    matrix = (program // parts).to(tl.int64)
    each = tl.arange(0, PARTS)
    squares = tl.sum(tl.load(parts_ptr + matrix * parts + each, mask=each < parts, other=0.0), axis=0)
    offsets = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + matrix * size + offsets, mask=mask, other=0.0)
    y = to_operand(x / (tl.sqrt(squares) + eps), PRECISION, TARGET)
    tl.store(y_ptr + matrix * size + offsets, y, mask=mask)


@triton.jit
def _product_kernel(
    a_ptr,  # [N, m, k] by strides
    b_ptr,  # [N, k, n] by strides
    d_ptr,  # [N, m, n], with the strides of c
    c_ptr,  # [N, m, n] by strides
    alpha,
    beta,
    m,
    n,
    k,
    stride_an,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_bc,
    stride_cn,
    stride_cm,
    stride_cc,
    BETA: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """c = alpha a b, and with BETA + beta d; c is rounded as an operand of the next product, unless it is the last."""
    program = tl.program_id(0)
    across, down = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    matrix = (program // (across * down)).to(tl.int64)
    rows = ((program // across) % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = (rows < m)[:, None], (columns < n)[None, :]
    ks = tl.arange(0, BLOCK_K)
    a_at = a_ptr + matrix * stride_an + rows[:, None].to(tl.int64) * stride_am
    b_at = b_ptr + matrix * stride_bn + columns[None, :].to(tl.int64) * stride_bc
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, k, BLOCK_K):
        inner = (first + ks).to(tl.int64)
        a = tl.load(a_at + inner[None, :] * stride_ak, mask=row_mask & (inner < k)[None, :], other=0.0)
        b = tl.load(b_at + inner[:, None] * stride_bk, mask=(inner < k)[:, None] & column_mask, other=0.0)
        sums = mm(a, b, sums, PRECISION, TARGET)
    at = matrix * stride_cn + rows[:, None].to(tl.int64) * stride_cm + columns[None, :].to(tl.int64) * stride_cc
    sums *= alpha
    if BETA:
        sums += beta * tl.load(d_ptr + at, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    if LAST:
        tl.store(c_ptr + at, sums, mask=row_mask & column_mask)
    else:
        tl.store(c_ptr + at, to_operand(sums, PRECISION, TARGET), mask=row_mask & column_mask)


def _scratch_sizes(shape, precision):
    """Elements of the sums of squares, of X twice and of A and its update."""
    matrices, size, side = shape[0], shape[1] * shape[2], min(shape[1:])
    sums = matrices * cdiv(size, _SQUARES_BLOCK) * (4 // DTYPES[precision].itemsize)
    # A multiple of 16 elements, so that what follows may be fetched 16 bytes at a time.
    return [cdiv(sums, 16) * 16, *2 * [matrices * size], *2 * [matrices * side * side]]


def newton_schulz_scratch(shape: Sequence[int], precision: str = "fp32") -> int:
    """Elements of scratch, of DTYPES[precision], that launch_newton_schulz needs for stacks `shape` [N, out, in]."""
    return int(sum(_scratch_sizes(shape, precision)))


def launch_newton_schulz(
    x: Tensor,  # [N, out, in]
    out: Tensor,  # [N, out, in]
    scratch: Tensor,
    *,
    steps: int = 5,
    precision: str = "fp32",
    coefficients: Sequence[float] = (3.4445, -4.7750, 2.0315),
    eps: float = 1e-7,
) -> None:
    """Muon's orthogonalisation of stacks of matrices: singular values are driven to about 1, zeros stay zero.

    X = x / (Frobenius norm + eps), then `steps` times X = a X + (b A + c A A) X with A = X X^T, taken on the smaller
    side. X and A are kept rounded to `precision`: terms that cancel must see the same numbers.

    Args:
        x: [N, out, in] float32, contiguous. out: of its shape, overwritten; may be x.
        scratch: flat, of DTYPES[precision], newton_schulz_scratch(x.shape, precision) elements or more.
        steps: 1 or more.
        coefficients: a, b, c.
    """
    check_precision(precision)
    check_same_device(x=x, out=out, scratch=scratch)
    check_tensor("x", x, (None, None, None), contiguous=True)
    check_tensor("out", out, x.shape, contiguous=True)
    if len(coefficients) != 3 or steps < 1:
        raise wrong("coefficients, steps", "three numbers, 1 or more", f"{coefficients}, {steps}", "Use the defaults.")
    if x.numel() == 0:
        return
    sizes = _scratch_sizes(x.shape, precision)
    check_size("scratch", scratch, DTYPES[precision], sum(sizes))
    squares, now, then, gram, update = torch.split(scratch[: sum(sizes)], sizes)
    squares = squares.view(torch.float32)
    a, b, c = (float(number) for number in coefficients)
    matrices, outputs, inputs = x.shape
    size, short, long = outputs * inputs, min(outputs, inputs), max(outputs, inputs)
    # A tall matrix is worked on as its transpose, by strides alone.
    whole = (size, inputs, 1) if outputs <= inputs else (size, 1, inputs)
    turned = (whole[0], whole[2], whole[1])
    square = (short * short, short, 1)
    target = current_chip().target
    # The interpreter pays per operation, not per number.
    block = min(128, max(32, triton.next_power_of_2(short))) if target == "interpreter" else 64

    def product(
        left, left_strides, right, right_strides, add, result, strides, columns, inner, alpha, beta, last=False
    ):
        _product_kernel[(matrices * cdiv(short, block) * cdiv(columns, block),)](
            *(left, right, add, result, alpha, beta, short, columns, inner),
            *(*left_strides, *right_strides, *strides),
            BETA=beta != 0,
            LAST=last,
            BLOCK_M=block,
            BLOCK_N=block,
            BLOCK_K=block if target == "interpreter" else 32,
            PRECISION=precision,
            TARGET=target,
            **launch_options(8, 3),
        )

    parts = cdiv(size, _SQUARES_BLOCK)
    _squares_kernel[(matrices * parts,)](x, squares, size, parts, BLOCK=_SQUARES_BLOCK)
    _normalise_kernel[(matrices * parts,)](
        *(x, squares, now, size, parts, float(eps)),
        BLOCK=_SQUARES_BLOCK,
        PARTS=triton.next_power_of_2(parts),
        PRECISION=precision,
        TARGET=target,
    )
    for i in range(steps):
        last = i == steps - 1
        product(now, whole, now, turned, gram, gram, square, short, long, 1.0, 0.0)
        product(gram, square, gram, square, gram, update, square, short, short, c, b)
        product(update, square, now, whole, now, out if last else then, whole, long, short, 1.0, a, last)
        now, then = then, now

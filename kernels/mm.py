"""Matrix products for all kernels here: the one place that calls tl.dot, and decides how operands are rounded.

PRECISION is what the operands of a product are rounded to; sums are float32 always. TARGET is a Chip's.

tf32x3 rounds nothing that is stored: a product of float32 operands is three on the matrix unit. Each operand is split
into what tf32 holds of it and the rest, rounded to tf32 again; of the four products of the parts the smallest is left
out. What is lost is at most 2^-21 of |a| |b| (2^-22 with the left out product, 2^-23 with each rest). Elsewhere than on
NVIDIA it is fp32.
"""

import triton
import triton.language as tl

PRECISIONS = ("fp32", "tf32x3", "tf32", "fp16", "bf16")


@triton.jit
def _round_mantissa(x, BITS: tl.constexpr):
    """float32 with BITS bits of mantissa kept, rounded to nearest even."""
    bits = x.to(tl.uint32, bitcast=True)
    drop: tl.constexpr = 23 - BITS
    odd = (bits >> drop) & 1
    rounded = (bits + ((1 << (drop - 1)) - 1) + odd) & (0xFFFFFFFF - ((1 << drop) - 1))
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def to_operand(x, PRECISION: tl.constexpr, TARGET: tl.constexpr):
    """A float32 tile as an operand of `mm`, rounded to nearest: what a producer stores."""
    # One return: the compiler wants one type from all, those of branches not taken included.
    if PRECISION == "fp16":
        operand = x.to(tl.float16)
    elif PRECISION == "bf16":
        if TARGET == "interpreter":  # which truncates
            operand = _round_mantissa(x, 7).to(tl.bfloat16)
        else:
            operand = x.to(tl.bfloat16)
    elif PRECISION == "tf32":  # the matrix unit truncates: half a bit is won by rounding here
        if TARGET == "interpreter":
            operand = _round_mantissa(x, 10)
        else:
            rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
            operand = tl.where(x == x, rounded, x)  # the GPU's NaN would become 0
    else:
        operand = x
    return operand


@triton.jit
def _three_products(a, b, sums):
    """sums + a b as tf32x3 has it, for the interpreter: the smaller products first, as the compiler orders them."""
    a_high, b_high = _round_mantissa(a, 10), _round_mantissa(b, 10)
    a_low, b_low = _round_mantissa(a - a_high, 10), _round_mantissa(b - b_high, 10)
    return sums + tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


@triton.jit
def mm(a, b, sums, PRECISION: tl.constexpr, TARGET: tl.constexpr):
    """sums + a b, with tiles a [M, K] and b [K, N] of float32, or of the half precision that is meant."""
    if TARGET == "interpreter":
        # The interpreter multiplies tf32 exactly and bfloat16 wrongly: round here, multiply in float32.
        if PRECISION == "fp16":
            sums = tl.dot(a.to(tl.float16).to(tl.float32), b.to(tl.float16).to(tl.float32), sums)
        elif PRECISION == "tf32":
            sums = tl.dot(_round_mantissa(a.to(tl.float32), 10), _round_mantissa(b.to(tl.float32), 10), sums)
        elif PRECISION == "tf32x3":
            sums = _three_products(a.to(tl.float32), b.to(tl.float32), sums)
        elif PRECISION == "bf16":
            sums = tl.dot(_round_mantissa(a.to(tl.float32), 7), _round_mantissa(b.to(tl.float32), 7), sums)
        else:
            sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    elif PRECISION == "fp32" or (PRECISION == "tf32x3" and TARGET != "cuda"):
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    elif PRECISION == "tf32x3":
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="tf32x3")
    elif PRECISION == "tf32":
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="tf32")
    elif PRECISION == "fp16":
        sums = tl.dot(a.to(tl.float16), b.to(tl.float16), sums)
    else:
        sums = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    return sums

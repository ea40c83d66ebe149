"""Matrix products for all kernels here: the one place that calls tl.dot, and decides how operands are rounded.

PRECISION is what the operands of a product are rounded to; sums are float32 always. TARGET is a Chip's.

tf32x3 rounds nothing that is stored: a product of float32 operands is three on the matrix unit. Each operand is split
into what tf32 holds of it, rounded to nearest, and the rest, of which tf32 holds all but the last bit; of the four
products of the parts the smallest is left out. What is lost is at most 2^-21 of |a| |b|: 2^-22 with the product that is
left out, 2^-23 with the rest of each operand. Elsewhere than on NVIDIA it is fp32.
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
def _split(x, TARGET: tl.constexpr):
    """A float32 tile as the sum of two that tf32 holds, but for 2^-23 of it; NaN where it is infinite."""
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    low = x - high
    if TARGET == "interpreter":  # the matrix unit ignores these bits
        low = (low.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, low


@triton.jit
def _three_products(a, b, sums, TARGET: tl.constexpr):
    """sums + a b of float32 tiles, by three products of tf32."""
    # By hand: the compiler's own tf32x3 splits in twice the instructions and looks at every sum for NaN.
    a_high, a_low = _split(a, TARGET)
    b_high, b_low = _split(b, TARGET)
    part = tl.dot(a_low, b_high, input_precision="tf32")
    part = tl.dot(a_high, b_low, part, input_precision="tf32")
    part = tl.dot(a_high, b_high, part, input_precision="tf32")
    # Added outside of the matrix unit, which may cut long sums off: here they are rounded to nearest.
    return sums + part


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
            sums = _three_products(a.to(tl.float32), b.to(tl.float32), sums, TARGET)
        elif PRECISION == "bf16":
            sums = tl.dot(_round_mantissa(a.to(tl.float32), 7), _round_mantissa(b.to(tl.float32), 7), sums)
        else:
            sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    elif PRECISION == "fp32" or (PRECISION == "tf32x3" and TARGET != "cuda"):
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    elif PRECISION == "tf32x3":
        sums = _three_products(a.to(tl.float32), b.to(tl.float32), sums, TARGET)
    elif PRECISION == "tf32":
        sums = tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="tf32")
    elif PRECISION == "fp16":
        sums = tl.dot(a.to(tl.float16), b.to(tl.float16), sums)
    else:
        sums = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)
    return sums

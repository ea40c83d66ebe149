"""Matrix products for all kernels here: the one place that calls tl.dot, and decides how operands are rounded.

PRECISION is what the operands of a product are rounded to; sums are float32 always. TARGET is a Chip's.
"""

import triton
import triton.language as tl

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")


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
    if PRECISION == "fp16":
        return x.to(tl.float16)
    if PRECISION == "bf16":
        if TARGET == "interpreter":  # which truncates
            return _round_mantissa(x, 7).to(tl.bfloat16)
        return x.to(tl.bfloat16)
    if PRECISION == "tf32":  # the matrix unit truncates: half a bit is won by rounding here
        if TARGET == "interpreter":
            return _round_mantissa(x, 10)
        bits = x.to(tl.uint32, bitcast=True)
        return ((bits + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return x


@triton.jit
def mm(a, b, sums, PRECISION: tl.constexpr, TARGET: tl.constexpr):
    """sums + a b, with tiles a [M, K] and b [K, N] of float32, or of the half precision that is meant."""
    if TARGET == "interpreter":
        # The interpreter multiplies tf32 exactly and bfloat16 wrongly: round here, multiply in float32.
        if PRECISION == "fp16":
            return tl.dot(a.to(tl.float16).to(tl.float32), b.to(tl.float16).to(tl.float32), sums)
        if PRECISION == "tf32":
            return tl.dot(_round_mantissa(a, 10), _round_mantissa(b, 10), sums)
        if PRECISION == "bf16":
            return tl.dot(_round_mantissa(a.to(tl.float32), 7), _round_mantissa(b.to(tl.float32), 7), sums)
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums)
    if PRECISION == "fp32":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sums, input_precision="ieee")
    if PRECISION == "tf32":
        return tl.dot(a, b, sums, input_precision="tf32")
    if PRECISION == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16), sums)
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)

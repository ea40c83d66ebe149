"""Matrix products for all kernels here: the one place that calls tl.dot, and decides how its operands are rounded."""

import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
"""What the operands of a product are rounded to; sums are float32 always."""


@triton.jit
def _round_mantissa(x, BITS: tl.constexpr):
    """float32 with BITS bits of mantissa kept, rounded to nearest even, for the interpreter."""
    bits = x.to(tl.uint32, bitcast=True)
    drop: tl.constexpr = 23 - BITS
    odd = (bits >> drop) & 1
    rounded = (bits + ((1 << (drop - 1)) - 1) + odd) & (0xFFFFFFFF - ((1 << drop) - 1))
    return tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)


@triton.jit
def mm(a, b, sums, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """sums + a b, with a [M, K] and b [K, N] as float32 tiles."""
    if PRECISION == "fp32":
        return tl.dot(a, b, sums, input_precision="ieee")
    if INTERPRETED:
        # The interpreter multiplies tf32 exactly and bfloat16 wrongly: round here, multiply in float32.
        if PRECISION == "fp16":
            return tl.dot(a.to(tl.float16).to(tl.float32), b.to(tl.float16).to(tl.float32), sums)
        if PRECISION == "tf32":
            return tl.dot(_round_mantissa(a, 10), _round_mantissa(b, 10), sums)
        return tl.dot(_round_mantissa(a, 7), _round_mantissa(b, 7), sums)
    if PRECISION == "tf32":
        return tl.dot(a, b, sums, input_precision="tf32")
    if PRECISION == "fp16":
        return tl.dot(a.to(tl.float16), b.to(tl.float16), sums)
    return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16), sums)


def is_interpreted(kernel):
    """Whether Triton was loaded in interpreter mode, where the numbers of tl.dot are its own."""
    return isinstance(kernel, InterpretedFunction)

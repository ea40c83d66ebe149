"""Sine and cosine for sine networks: the one place that decides their accuracy on a GPU.

omega = 30 makes arguments of tens to hundreds of radians, where a bare hardware sine is wrong in the fifth digit and
the compiler's precise one takes a divergent slow path. Here the argument is first brought to [-pi/2, pi/2] by
Cody and Waite's method, then two short polynomials do the rest: no branches, no table, no special-function unit.

Error against float64 at most 2e-7 for |x| <= 1e4; NaN and infinity give NaN.
"""

import triton
import triton.language as tl

# pi in three pieces of 11 bits and a rest. A multiple of pi below 2^13 times such a piece is exact in float32, so the
# reduction loses nothing whether or not the compiler fuses it.
_PI_A = tl.constexpr(3.140625)
_PI_B = tl.constexpr(0.0009675025939941406)
_PI_C = tl.constexpr(1.5099067240953445e-07)
_PI_D = tl.constexpr(5.126688353354614e-12)
_INV_PI = tl.constexpr(0.3183098861837907)

# Minimax on [-pi/2, pi/2] with the first coefficients fixed at 1: sin to 4.7e-9, cos to 2.5e-10 before rounding.
_S3 = tl.constexpr(-0.16666657058574616)
_S5 = tl.constexpr(0.00833301635506051)
_S7 = tl.constexpr(-0.00019806547080382115)
_S9 = tl.constexpr(2.599903201574126e-06)
_C2 = tl.constexpr(-0.4999999954731952)
_C4 = tl.constexpr(0.04166664062519071)
_C6 = tl.constexpr(-0.0013888402068835924)
_C8 = tl.constexpr(2.4761808130033258e-05)
_C10 = tl.constexpr(-2.607566208928658e-07)


@triton.jit
def sincos(x):
    """sin(x) and cos(x) of a float32 tile of any shape, in radians."""
    n = tl.floor(tl.fma(x, _INV_PI, 0.5))  # multiples of pi
    r = tl.fma(n, -_PI_A, x)
    r = tl.fma(n, -_PI_B, r)
    r = tl.fma(n, -_PI_C, r)
    r = tl.fma(n, -_PI_D, r)
    s = r * r
    odd = tl.fma(tl.fma(tl.fma(_S9, s, _S7), s, _S5), s, _S3)
    even = tl.fma(tl.fma(tl.fma(tl.fma(_C10, s, _C8), s, _C6), s, _C4), s, _C2)
    # An odd multiple of pi turns both signs.
    half = n * 0.5
    sign = 1.0 - 4.0 * (half - tl.floor(half))
    return sign * tl.fma(r * s, odd, r), sign * tl.fma(s, even, 1.0)


@triton.jit
def _sincos_kernel(
    x_ptr,  # [size] float32
    sin_ptr,  # [size] float32
    cos_ptr,  # [size] float32
    size,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    sine, cosine = sincos(tl.load(x_ptr + offsets, mask=mask, other=0.0))
    tl.store(sin_ptr + offsets, sine, mask=mask)
    tl.store(cos_ptr + offsets, cosine, mask=mask)


def launch_sincos(x, sin_out, cos_out, block=1024):
    """Write sin(x) and cos(x), one pass over memory.

    Args:
        x: float32 tensor, contiguous, radians.
        sin_out, cos_out: float32 tensors of its shape, contiguous, overwritten.
        block: elements per program, a power of two.
    """
    for name, tensor in (("x", x), ("sin_out", sin_out), ("cos_out", cos_out)):
        if str(tensor.dtype) != "torch.float32" or not tensor.is_contiguous() or tensor.shape != x.shape:
            raise ValueError(
                f"{name}: expected a contiguous float32 tensor of shape {list(x.shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {tensor.stride()}. Convert it, or call .contiguous()."
            )
    if x.numel():
        _sincos_kernel[(triton.cdiv(x.numel(), block),)](x, sin_out, cos_out, x.numel(), BLOCK=block)

"""Sine and cosine for sine networks: the one place that decides their accuracy on a GPU.

omega = 30 makes arguments of tens to hundreds of radians, where a bare hardware sine is wrong in the fifth digit and
the compiler's precise one takes a divergent slow path. Here the argument is first reduced by Cody and Waite's method:

- to [-pi/2, pi/2] and then two short polynomials: in fp32 and tf32x3, on AMD. Error at most 2e-7 for |x| <= 1e4.
- to [-pi, pi] and then the special-function unit, half the instructions: with tf32, fp16 and bf16 on NVIDIA. Error at
  most 1e-6, far below the rounding of the operands. Under the interpreter Triton's own sine stands for the unit.

No branches, no table; NaN and infinity give NaN. Beyond |x| of 1e7 the result is no sine any more, and not bounded.
"""

import triton
import triton.language as tl

from .chip import current_chip

# pi in three pieces of 11 bits and a rest. A multiple of pi below 2^13 times such a piece is exact in float32, so the
# reduction loses nothing whether or not the compiler fuses it.
_PI_A = tl.constexpr(3.140625)
_PI_B = tl.constexpr(0.0009675025939941406)
_PI_C = tl.constexpr(1.5099067240953445e-07)
_PI_D = tl.constexpr(5.126688353354614e-12)
_INV_PI = tl.constexpr(0.3183098861837907)

# The same of 2 pi; what the last piece leaves is n times 2e-13.
_TWO_PI_A = tl.constexpr(6.28125)
_TWO_PI_B = tl.constexpr(0.0019350051879882812)
_TWO_PI_C = tl.constexpr(3.0199141567600891e-07)
_INV_TWO_PI = tl.constexpr(0.15915494309189535)

# Added and taken away again it rounds to a whole number, without the slow conversion unit.
_WHOLE = tl.constexpr(12582912.0)  # 1.5 * 2^23

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
def _polynomial(x):
    shifted = tl.fma(x, _INV_PI, _WHOLE)
    n = shifted - _WHOLE  # multiples of pi
    r = tl.fma(n, -_PI_A, x)
    r = tl.fma(n, -_PI_B, r)
    r = tl.fma(n, -_PI_C, r)
    r = tl.fma(n, -_PI_D, r)
    s = r * r
    odd = tl.fma(tl.fma(tl.fma(_S9, s, _S7), s, _S5), s, _S3)
    even = tl.fma(tl.fma(tl.fma(tl.fma(_C10, s, _C8), s, _C6), s, _C4), s, _C2)
    # An odd multiple of pi turns both signs: the lowest bit of the shifted number becomes the sign bit.
    sign = shifted.to(tl.int32, bitcast=True) << 31
    sine, cosine = tl.fma(r * s, odd, r), tl.fma(s, even, 1.0)
    return (
        (sine.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True),
        (cosine.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True),
    )


@triton.jit
def _special_function_unit(x, TARGET: tl.constexpr):
    n = tl.fma(x, _INV_TWO_PI, _WHOLE) - _WHOLE
    r = tl.fma(n, -_TWO_PI_C, tl.fma(n, -_TWO_PI_B, tl.fma(n, -_TWO_PI_A, x)))
    if TARGET == "cuda":
        sine = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1)
        cosine = tl.inline_asm_elementwise(
            "cos.approx.f32 $0, $1;", "=f,f", [r], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        sine, cosine = tl.sin(r), tl.cos(r)
    return sine, cosine


@triton.jit
def sincos(x, PRECISION: tl.constexpr, TARGET: tl.constexpr):
    """sin(x) and cos(x) of a float32 tile of any shape, in radians; what is not used costs nothing."""
    if PRECISION == "fp32" or PRECISION == "tf32x3" or TARGET == "hip":
        sine, cosine = _polynomial(x)
    else:
        sine, cosine = _special_function_unit(x, TARGET)
    return sine, cosine


@triton.jit
def _sincos_kernel(
    x_ptr,  # [size] float32
    sin_ptr,  # [size] float32
    cos_ptr,  # [size] float32
    size,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    sine, cosine = sincos(tl.load(x_ptr + offsets, mask=mask, other=0.0), PRECISION, TARGET)
    tl.store(sin_ptr + offsets, sine, mask=mask)
    tl.store(cos_ptr + offsets, cosine, mask=mask)


def launch_sincos(x, sin_out, cos_out, block=1024, precision="fp32"):
    """Write sin(x) and cos(x), one pass over memory.

    Args:
        x: float32 tensor, contiguous, radians.
        sin_out, cos_out: float32 tensors of its shape, contiguous, overwritten.
        block: elements per program, a power of two.
        precision: of the products that these values are meant for; see above.
    """
    for name, tensor in (("x", x), ("sin_out", sin_out), ("cos_out", cos_out)):
        if str(tensor.dtype) != "torch.float32" or not tensor.is_contiguous() or tensor.shape != x.shape:
            raise ValueError(
                f"{name}: expected a contiguous float32 tensor of shape {list(x.shape)}, got {tensor.dtype} "
                f"{list(tensor.shape)} with strides {tensor.stride()}. Convert it, or call .contiguous()."
            )
    if x.numel():
        grid = (triton.cdiv(x.numel(), block),)
        target = current_chip().target
        _sincos_kernel[grid](x, sin_out, cos_out, x.numel(), BLOCK=block, PRECISION=precision, TARGET=target)

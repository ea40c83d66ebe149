"""Sine and cosine of a tile from one range reduction, in passes that stay in the cache.

torch.sin and torch.cos each reduce the argument on their own, and either costs as much as a dozen multiplications of the
tile. Here the argument is brought to [-pi/2, pi/2] once (Cody and Waite), two short polynomials share its square, and the
sign is a bit. Every operation is one of PyTorch's vectorised in-place calls. What it brings: docs/one-pass.md.

Error against float64 at most 2.5e-7 for |z| <= 1e4, where float32 itself is spaced by up to 1e-3. NaN and infinity give
NaN.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

# pi in pieces of 11 bits and a rest: n times the first two is exact in float32, fused or not, for |n| < 2^13.
_PI_A, _PI_B = 3.140625, 0.0009675025939941406
_PI_C = math.pi - _PI_A - _PI_B

# Minimax on [-pi/2, pi/2] with the first coefficients fixed at 1.
_SINE = (-0.16666657058574616, 0.00833301635506051, -0.00019806547080382115, 2.599903201574126e-06)
_COSINE = (-0.4999993202513509, 0.041663981536756364, -0.0013855862550337904, 2.31928273561402e-05)


@cache
def _constant(value: float) -> Tensor:
    # torch.addcmul takes its first term as a tensor; one without dimensions broadcasts in the vectorised loop.
    return torch.tensor(value, dtype=torch.float32)


def sincos_(z: Tensor, sine: Tensor, scratch: tuple[Tensor, Tensor]) -> None:
    """Write sin(z) to `sine` and cos(z) over z.

    Args:
        z, sine: same shape and dtype, contiguous.
        scratch: two more such tensors, overwritten. Used for float32 on a CPU; elsewhere PyTorch's own functions run.
    """
    if z.dtype != torch.float32 or z.device.type != "cpu":
        torch.sin(z, out=sine)
        z.cos_()
        return
    turns, square = scratch
    # Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits.
    magic = _constant(12582912.0)
    torch.add(magic, z, alpha=1 / math.pi, out=turns)
    torch.sub(turns, magic, out=sine)
    for part in (_PI_A, _PI_B, _PI_C):
        z.sub_(sine, alpha=part)
    sign = turns.view(torch.int32)
    sign.bitwise_left_shift_(31)  # an odd multiple of pi turns both signs
    torch.mul(z, z, out=square)
    _polynomial(_SINE, square, sine)
    sine.mul_(z)
    _polynomial(_COSINE, square, z)
    sine.view(torch.int32).bitwise_xor_(sign)
    z.view(torch.int32).bitwise_xor_(sign)


def _polynomial(coefficients: tuple[float, float, float, float], s: Tensor, out: Tensor) -> None:
    """1 + c0 s + c1 s^2 + c2 s^3 + c3 s^4 by Horner's rule."""
    c0, c1, c2, c3 = coefficients
    torch.add(_constant(c2), s, alpha=c3, out=out)
    for c in (c1, c0, 1.0):
        torch.addcmul(_constant(c), out, s, out=out)

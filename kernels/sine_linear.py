"""y = sin(omega (x W^T + b)) and its gradients, batched over N networks: Triton kernels and their launchers.

Three kernels: the forward product with sine in the epilogue, dx = dz W with an optional cosine in the epilogue, and
dW = dz^T x with db, split over the points into partial sums that are added up in a fixed order. Layers with at most
FEW_INPUTS inputs (coordinates) use no matrix unit: a product that thin is cheaper as multiply-adds, always in float32.

Every tensor may have any strides; a stride of 0 over N shares it between the networks. Products round their operands
to PRECISION (see mm.py) and add in float32; the sine's argument is float32 always.
"""

from dataclasses import dataclass

import triton
import triton.language as tl

from .mm import is_interpreted, mm
from .trig import sincos

FEW_INPUTS = 4


@triton.jit
def _pre_activation(
    x_ptr,  # of this network and these rows
    w_ptr,  # of this network
    rows,
    row_mask,
    columns,
    column_mask,
    inputs,
    stride_xp,
    stride_xk,
    stride_wo,
    stride_wk,
    FEW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """x W^T for a tile of points and outputs."""
    sums = tl.zeros([BLOCK_P, BLOCK_O], tl.float32)
    if FEW > 0:
        for k in tl.static_range(FEW):
            x = tl.load(x_ptr + rows * stride_xp + k * stride_xk, mask=row_mask, other=0.0).to(tl.float32)
            w = tl.load(w_ptr + columns * stride_wo + k * stride_wk, mask=column_mask, other=0.0).to(tl.float32)
            sums = tl.fma(x[:, None], w[None, :], sums)
    else:
        ks = tl.arange(0, BLOCK_K)
        for first in range(0, inputs, BLOCK_K):
            k_mask = first + ks < inputs
            x = tl.load(
                x_ptr + rows[:, None] * stride_xp + (first + ks)[None, :] * stride_xk,
                mask=row_mask[:, None] & k_mask[None, :],
                other=0.0,
            )
            w = tl.load(
                w_ptr + (first + ks)[:, None] * stride_wk + columns[None, :] * stride_wo,
                mask=k_mask[:, None] & column_mask[None, :],
                other=0.0,
            )
            sums = mm(x, w, sums, PRECISION, INTERPRETED)
    return sums


@triton.jit
def _forward_kernel(
    x_ptr,  # [N, P, in]
    w_ptr,  # [N, out, in]
    b_ptr,  # [N, out], unused without a bias
    y_ptr,  # [N, P, out]
    z_ptr,  # [N, P, out], unused unless SAVE
    omega,
    points,
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
    HAS_BIAS: tl.constexpr,
    SINE: tl.constexpr,
    SAVE: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    network = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row_mask, column_mask = rows < points, columns < outputs
    z = _pre_activation(
        x_ptr + network * stride_xn,
        w_ptr + network * stride_wn,
        rows,
        row_mask,
        columns,
        column_mask,
        inputs,
        stride_xp,
        stride_xk,
        stride_wo,
        stride_wk,
        FEW,
        BLOCK_P,
        BLOCK_O,
        BLOCK_K,
        PRECISION,
        INTERPRETED,
    )
    if HAS_BIAS:
        bias = tl.load(b_ptr + network * stride_bn + columns * stride_bo, mask=column_mask, other=0.0)
        z += bias.to(tl.float32)[None, :]
    z *= omega
    at = network * points * outputs + rows[:, None] * outputs + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if SINE:
        sine, _ = sincos(z)
        tl.store(y_ptr + at, sine.to(y_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(y_ptr + at, z.to(y_ptr.dtype.element_ty), mask=mask)
    if SAVE:
        tl.store(z_ptr + at, z, mask=mask)


@triton.jit
def _slope_kernel(
    dy_ptr,  # [N, P, out] by strides
    z_ptr,  # [N, P, out]
    dz_ptr,  # [N, P, out]
    omega,
    points,
    outputs,
    stride_dn,
    stride_dp,
    stride_do,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dz = omega cos(z) dy, the gradient of x W^T + b."""
    network = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = (rows < points)[:, None] & (columns < outputs)[None, :]
    at = network * points * outputs + rows[:, None] * outputs + columns[None, :]
    dy = tl.load(
        dy_ptr + network * stride_dn + rows[:, None] * stride_dp + columns[None, :] * stride_do, mask=mask, other=0.0
    )
    _, cosine = sincos(tl.load(z_ptr + at, mask=mask, other=0.0))
    tl.store(dz_ptr + at, (omega * cosine * dy.to(tl.float32)).to(dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _input_gradient_kernel(
    dz_ptr,  # [N, P, out]
    w_ptr,  # [N, out, in] by strides
    z_ptr,  # [N, P, in]: of the layer before, where COSINE
    dx_ptr,  # [N, P, in]
    omega,  # of the layer before
    points,
    inputs,
    outputs,
    stride_wn,
    stride_wo,
    stride_wk,
    COSINE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dx = dz W; with COSINE at once the dz of the layer before, omega cos(z) dx: each cosine is computed once."""
    network = tl.program_id(2).to(tl.int64)
    rows = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    columns = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_mask, column_mask = rows < points, columns < inputs
    sums = tl.zeros([BLOCK_P, BLOCK_K], tl.float32)
    os = tl.arange(0, BLOCK_O)
    for first in range(0, outputs, BLOCK_O):
        o_mask = first + os < outputs
        dz = tl.load(
            dz_ptr + network * points * outputs + rows[:, None] * outputs + (first + os)[None, :],
            mask=row_mask[:, None] & o_mask[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + network * stride_wn + (first + os)[:, None] * stride_wo + columns[None, :] * stride_wk,
            mask=o_mask[:, None] & column_mask[None, :],
            other=0.0,
        )
        sums = mm(dz, w, sums, PRECISION, INTERPRETED)
    at = network * points * inputs + rows[:, None] * inputs + columns[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    if COSINE:
        _, cosine = sincos(tl.load(z_ptr + at, mask=mask, other=0.0))
        sums = sums * (omega * cosine)
    tl.store(dx_ptr + at, sums.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_gradient_kernel(
    dz_ptr,  # [N, P, out]
    x_ptr,  # [N, P, in] by strides
    dw_ptr,  # [S, N, out, in]
    db_ptr,  # [S, N, out]
    networks,
    points,
    inputs,
    outputs,
    rows_per_split,
    stride_xn,
    stride_xp,
    stride_xk,
    HAS_BIAS: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """dW = dz^T x and db = column sums of dz, over one split of the points."""
    which = tl.program_id(2).to(tl.int64)  # split * networks + network
    network, split = which % networks, which // networks
    outs = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    ks = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    out_mask, k_mask = outs < outputs, ks < inputs
    dw = tl.zeros([BLOCK_O, BLOCK_K], tl.float32)
    db = tl.zeros([BLOCK_O], tl.float32)
    begin = split * rows_per_split
    end = tl.minimum(begin + rows_per_split, points)
    for first in range(0, rows_per_split, BLOCK_P):
        rows = begin + first + tl.arange(0, BLOCK_P)
        row_mask = rows < end
        dz = tl.load(
            dz_ptr + network * points * outputs + rows[:, None] * outputs + outs[None, :],
            mask=row_mask[:, None] & out_mask[None, :],
            other=0.0,
        )
        if HAS_BIAS:
            db += tl.sum(dz.to(tl.float32), axis=0)
        if FEW > 0:
            for k in tl.static_range(FEW):
                x = tl.load(
                    x_ptr + network * stride_xn + rows * stride_xp + k * stride_xk, mask=row_mask, other=0.0
                ).to(tl.float32)
                column = tl.sum(dz.to(tl.float32) * x[:, None], axis=0)
                dw += tl.where((ks == k)[None, :], column[:, None], 0.0)
        else:
            x = tl.load(
                x_ptr + network * stride_xn + rows[:, None] * stride_xp + ks[None, :] * stride_xk,
                mask=row_mask[:, None] & k_mask[None, :],
                other=0.0,
            )
            dw = mm(tl.trans(dz), x, dw, PRECISION, INTERPRETED)
    at = which * outputs * inputs + outs[:, None] * inputs + ks[None, :]
    tl.store(dw_ptr + at, dw, mask=out_mask[:, None] & k_mask[None, :])
    if HAS_BIAS:  # the same sums in every program along the inputs: the first one writes
        first_program = tl.program_id(1) == 0
        tl.store(db_ptr + which * outputs + outs, db, mask=out_mask & first_program)


@dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's tile: points, outputs, inputs; powers of two, at least 16 where a product takes part."""

    points: int = 64
    outputs: int = 64
    inputs: int = 32


def _few(inputs):
    return inputs if inputs <= FEW_INPUTS else 0


def _strides(tensor):
    """Strides of [N, ...] or of [...], which all networks share."""
    return tensor.stride() if tensor.ndim == 3 else (0, *tensor.stride())


def launch_forward(x, w, b, y, z=None, *, omega, sine=True, precision="fp32", tiles=Tiles()):
    """y = sin(omega (x W^T + b)), or without the sine.

    Args:
        x: [P, in] (shared) or [N, P, in], any strides; float32 or half.
        w: [N, out, in]; b: [N, out] or None.
        y: [N, P, out] contiguous, overwritten.
        z: [N, P, out] float32 contiguous, overwritten with the sine's argument; None where it is not needed.
        omega: radians per unit.
        precision: what the operands of the product are rounded to; see mm.py.
        tiles: sizes of the tile.
    """
    networks, outputs, inputs = w.shape
    points = x.shape[-2]
    if networks * points * outputs == 0:
        return
    grid = (triton.cdiv(points, tiles.points), triton.cdiv(outputs, tiles.outputs), networks)
    _forward_kernel[grid](
        x,
        w,
        w if b is None else b,
        y,
        y if z is None else z,
        float(omega),
        points,
        inputs,
        outputs,
        *_strides(x),
        *w.stride(),
        *((0, 0) if b is None else b.stride()),
        HAS_BIAS=b is not None,
        SINE=sine,
        SAVE=z is not None,
        FEW=_few(inputs),
        BLOCK_P=tiles.points,
        BLOCK_O=tiles.outputs,
        BLOCK_K=tiles.inputs,
        PRECISION=precision,
        INTERPRETED=is_interpreted(_forward_kernel),
    )


def launch_slope(dy, z, dz, *, omega, tiles=Tiles()):
    """dz = omega cos(z) dy; dy [N, P, out] of any strides, z and dz [N, P, out] contiguous, dz overwritten."""
    networks, points, outputs = z.shape
    if z.numel() == 0:
        return
    grid = (triton.cdiv(points, tiles.points), triton.cdiv(outputs, tiles.outputs), networks)
    _slope_kernel[grid](
        dy, z, dz, float(omega), points, outputs, *dy.stride(), BLOCK_P=tiles.points, BLOCK_O=tiles.outputs
    )


def launch_input_gradient(dz, w, dx, z=None, *, omega=1.0, precision="fp32", tiles=Tiles()):
    """dx = dz W, or with the `z` [N, P, in] of the layer before at once its dz: omega cos(z) (dz W).

    Args:
        dz: [N, P, out] contiguous. w: [N, out, in]. dx: [N, P, in] contiguous, overwritten.
        omega: of the layer before.
    """
    networks, outputs, inputs = w.shape
    points = dz.shape[1]
    if networks * points * inputs == 0:
        return
    grid = (triton.cdiv(points, tiles.points), triton.cdiv(inputs, tiles.inputs), networks)
    _input_gradient_kernel[grid](
        dz,
        w,
        dx if z is None else z,
        dx,
        float(omega),
        points,
        inputs,
        outputs,
        *w.stride(),
        COSINE=z is not None,
        BLOCK_P=tiles.points,
        BLOCK_O=tiles.outputs,
        BLOCK_K=tiles.inputs,
        PRECISION=precision,
        INTERPRETED=is_interpreted(_input_gradient_kernel),
    )


def launch_weight_gradient(dz, x, dw, db=None, *, precision="fp32", tiles=Tiles()):
    """Partial sums of dW = dz^T x and db: split s holds those of its share of the points; add them up in order.

    Args:
        dz: [N, P, out] contiguous. x: [P, in] (shared) or [N, P, in], any strides.
        dw: [S, N, out, in] float32 contiguous, db: [S, N, out] or None; overwritten. S is the number of splits.
    """
    splits, networks, outputs, inputs = dw.shape
    points = dz.shape[1]
    if dw.numel() == 0:
        return
    share = triton.cdiv(triton.cdiv(max(points, 1), splits), tiles.points) * tiles.points
    grid = (triton.cdiv(outputs, tiles.outputs), triton.cdiv(inputs, tiles.inputs), splits * networks)
    _weight_gradient_kernel[grid](
        dz,
        x,
        dw,
        dw if db is None else db,
        networks,
        points,
        inputs,
        outputs,
        share,
        *_strides(x),
        HAS_BIAS=db is not None,
        FEW=_few(inputs),
        BLOCK_P=tiles.points,
        BLOCK_O=tiles.outputs,
        BLOCK_K=tiles.inputs,
        PRECISION=precision,
        INTERPRETED=is_interpreted(_weight_gradient_kernel),
    )

"""Launchers of layers, one by one: tensors in, tensors out; nothing is allocated. All at once: chains.py."""

from dataclasses import replace

import torch
from torch import Tensor

from .checks import (
    cdiv,
    check_networks,
    check_precision,
    check_same_device,
    check_tensor,
    launch_options,
    wrong,
)
from .chip import current_chip
from .configs import FEW_INPUTS, tiles_for
from .sine_linear import ARGUMENT, COSINE, NOTHING, forward_kernel
from .sine_linear_backward import (
    first_gradient_kernel,
    input_gradient_kernel,
    slope_kernel,
    weight_gradient_kernel,
)
from .tiles import Tiles

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
FewInputs = tuple[Tensor, Tensor]
"""Weight [N, H, in] and bias [N, H] of a first layer, float32, omega folded in, last axis contiguous."""


def launch_forward(
    x: Tensor,  # [P, in] (shared) or [N, P, in]
    w: Tensor,  # [N, out, in]
    b: Tensor | None,  # [N, out]
    y: Tensor,  # [N, P, out] or more rows, last axis contiguous; overwritten
    z: Tensor | None = None,  # like y, float32; overwritten with the sine's argument
    cosine: Tensor | None = None,  # like y; overwritten with the sine's derivative
    *,
    omega: float,
    sine: bool = True,
    operand: bool = False,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """y = sin(omega (x W^T + b)), or without the sine.

    Args:
        x, w, b: any strides; float32 or half.
        y, z, cosine: rows beyond those of x get what coordinates of 0 give.
        omega: radians per unit.
        operand: round y and the cosine as operands of `precision`.
        precision: what the operands of the product are rounded to; see mm.py.
        tiles: sizes of the tile; the table's by default.

    Raises ValueError for tensors that do not belong together.
    """
    networks, outputs, inputs = w.shape
    saved = z if z is not None else cosine
    rows_x, rows_y = x.shape[-2], y.shape[1]
    _check_product(x, w, precision)
    check_networks(networks)
    if b is not None:
        check_tensor("b", b, (networks, outputs), FLOATS)
    check_tensor("y", y, (networks, None, outputs), FLOATS, rows=True)
    if z is not None and cosine is not None:
        raise wrong("z and cosine", "one of them", "both", "Pass the one that the backward pass needs.")
    if saved is not None:
        dtypes = (torch.float32,) if z is not None else FLOATS
        check_tensor("z" if z is not None else "cosine", saved, y.shape, dtypes, rows=True)
    check_same_device(x=x, w=w, b=b, y=y, saved=saved)
    if y.numel() == 0:
        return
    few = inputs if inputs <= FEW_INPUTS else 0
    t = tiles or tiles_for(
        "forward_first" if few else "forward",
        precision,
        max(outputs, inputs),
        few=leaves_idle(rows_y, outputs, networks),
    )
    full = rows_y % t.points == 0 and outputs % t.outputs == 0 and inputs % t.inputs == 0
    grid = (cdiv(rows_y, t.points) * cdiv(outputs, t.outputs), networks)
    forward_kernel[grid](
        x,
        w,
        w if b is None else b,
        y,
        y if saved is None else saved,
        float(omega),
        rows_x,
        rows_y,
        inputs,
        outputs,
        *strides_of(x),
        *w.stride(),
        *((0, 0) if b is None else b.stride()),
        *y.stride()[:2],
        *(y if saved is None else saved).stride()[:2],
        HAS_BIAS=b is not None,
        SINE=sine,
        SAVE=(ARGUMENT if z is not None else COSINE if cosine is not None else NOTHING).value,
        FEW=few,
        OPERAND=operand,
        EVEN=full and (rows_x == rows_y or few > 0),
        BLOCK_P=t.points,
        BLOCK_O=t.outputs,
        BLOCK_K=t.inputs,
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages),
    )


def launch_slope(
    dy: Tensor,  # [N, P, out], any strides
    z: Tensor,  # [N, P, out] float32, contiguous
    dz: Tensor,  # [N, P, out], contiguous; overwritten
    *,
    omega: float,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """dz = omega cos(z) dy.

    Raises ValueError for tensors that do not belong together.
    """
    check_tensor("z", z, (None, None, None), contiguous=True)
    check_tensor("dy", dy, z.shape, FLOATS)
    check_tensor("dz", dz, z.shape, FLOATS, contiguous=True)
    check_same_device(dy=dy, z=z, dz=dz)
    check_precision(precision)
    check_networks(z.shape[0])
    if z.numel() == 0:
        return
    networks, points, outputs = z.shape
    tiles = tiles or Tiles(1024 if current_chip().target == "interpreter" else 64, 64)
    grid = (cdiv(points, tiles.points), cdiv(outputs, tiles.outputs), networks)
    slope_kernel[grid](
        dy,
        z,
        dz,
        float(omega),
        points,
        outputs,
        *dy.stride(),
        BLOCK_P=tiles.points,
        BLOCK_O=tiles.outputs,
        PRECISION=precision,
        TARGET=current_chip().target,
    )


def launch_input_gradient(
    dz: Tensor,  # [N * M, P, out], last axis contiguous
    w: Tensor,  # [N * M, out, in], any strides
    dx: Tensor,  # [N, P, in], last axis contiguous; overwritten
    cosine: Tensor | None = None,  # [N, P, in], last axis contiguous
    *,
    first: FewInputs | None = None,
    x: Tensor | None = None,  # coordinates [P, in] or [N, P, in], with `first`
    operand: bool = False,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """dx = dz W, summed over the M networks that share an input; times a cosine at once dz of the layer before.

    Args:
        cosine: the layer before's, as `launch_forward` left it. With `first` and `x` it is computed from coordinates.
        operand, precision, tiles: as in `launch_forward`.

    Raises ValueError for tensors that do not belong together.
    """
    stacked, outputs, inputs = w.shape
    networks, rows = dx.shape[0], dx.shape[1]
    coordinates = 0 if first is None or x is None else x.shape[-1]
    if networks == 0 or stacked % networks:
        raise wrong("w", f"a multiple of {networks} networks", stacked, "See the launcher's docstring.")
    check_precision(precision)
    check_tensor("w", w, (None, None, None), FLOATS)
    check_tensor("dz", dz, (stacked, rows, outputs), FLOATS, rows=True)
    check_tensor("dx", dx, (networks, None, inputs), FLOATS, rows=True)
    if cosine is not None:
        check_tensor("cosine", cosine, dx.shape, FLOATS, rows=True)
    if first is not None:
        if x is None or cosine is not None:
            raise wrong("x and cosine", "coordinates and no cosine, with `first`", "others", "Pass x=coordinates.")
        check_first(first, x, networks, inputs)
    check_same_device(dz=dz, w=w, dx=dx, cosine=cosine, x=x)
    check_networks(networks)
    if dx.numel() == 0:
        return
    t = tiles or tiles_for("input_gradient", precision, max(outputs, inputs), few=leaves_idle(rows, inputs, networks))
    grid = (cdiv(rows, t.points) * cdiv(inputs, t.inputs), networks)
    coords = dx if x is None else x
    input_gradient_kernel[grid](
        dz,
        w,
        dx if cosine is None else cosine,
        dx,
        coords,
        *_first_tensors(first, w),
        stacked // networks,
        coords.shape[-2],
        rows,
        inputs,
        outputs,
        *dz.stride()[:2],
        *w.stride(),
        *(dx if cosine is None else cosine).stride()[:2],
        *dx.stride()[:2],
        *strides_of(coords),
        *_first_strides(first),
        HAS_COSINE=cosine is not None,
        FIRST=coordinates,
        OPERAND=operand,
        EVEN=rows % t.points == 0 and outputs % t.outputs == 0 and inputs % t.inputs == 0,
        BLOCK_P=t.points,
        BLOCK_O=t.outputs,
        BLOCK_K=t.inputs,
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages),
    )


def launch_first_gradient(
    dz: Tensor,  # [N * M, P, out], last axis contiguous: of the second layer, zero beyond the points
    w: Tensor,  # [N * M, out, in], any strides: of the second layer
    x: Tensor,  # coordinates [P, C] or [N, P, C], any strides; P rows or fewer
    dw: Tensor,  # [S, N, in, C] float32, contiguous; overwritten. S as of `first_gradient_splits`
    db: Tensor,  # [S, N, in] float32, contiguous; overwritten
    *,
    first: FewInputs,
    add: bool = False,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """Partial sums of the first layer's dW and db from the second layer's dz, without the first layer's dz in memory.

    Arguments as in `launch_input_gradient` and `launch_weight_gradient`.

    Raises ValueError for tensors that do not belong together.
    """
    stacked, outputs, inputs = w.shape
    splits, networks, rows = dw.shape[0], dw.shape[1], dz.shape[1]
    check_precision(precision)
    check_tensor("w", w, (None, None, None), FLOATS)
    check_tensor("dz", dz, (stacked, None, outputs), FLOATS, rows=True)
    check_tensor("dw", dw, (None, None, inputs, x.shape[-1]), contiguous=True)
    check_tensor("db", db, (splits, networks, inputs), contiguous=True)
    check_first(first, x, networks, inputs)
    check_same_device(dz=dz, w=w, x=x, dw=dw, db=db)
    check_networks(networks)
    t = tiles or tiles_for("first_gradient", precision, max(outputs, inputs))
    blocks = cdiv(rows, t.points)
    if splits < blocks or stacked % max(networks, 1):
        got = f"{splits} for {stacked} of {rows} rows"
        raise wrong("dw", f"{blocks} blocks of rows and a share of the networks", got, "Ask first_gradient_splits.")
    if dw.numel() == 0:
        return
    first_gradient_kernel[(blocks * cdiv(inputs, t.inputs), networks)](
        dz,
        w,
        dw,
        db,
        x,
        *first,
        stacked // networks,
        x.shape[-2],
        rows,
        inputs,
        outputs,
        *dz.stride()[:2],
        *w.stride(),
        *strides_of(x),
        *_first_strides(first),
        FIRST=x.shape[-1],
        ADD=add,
        EVEN=rows % t.points == 0 and outputs % t.outputs == 0 and inputs % t.inputs == 0,
        BLOCK_P=t.points,
        BLOCK_O=t.outputs,
        BLOCK_K=t.inputs,
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages),
    )


def first_gradient_splits(rows: int, width: int, precision: str) -> int:
    """Partial sums of `launch_first_gradient`: one per block of rows."""
    return cdiv(rows, tiles_for("first_gradient", precision, width).points)


def launch_weight_gradient(
    dz: Tensor,  # [N, P, out], last axis contiguous; or [L, N, P, out] of several layers
    x: Tensor,  # [P, in] (shared) or [N, P, in], any strides; [L, N, P, in] beside as many dz
    dw: Tensor,  # [S, N, out, in] float32, contiguous; overwritten. Or [L, S, N, out, in], contiguous but for L
    db: Tensor | None = None,  # [S, N, out] float32, contiguous; overwritten. Or [L, S, N, out]
    *,
    add: bool = False,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """Partial sums of dW = dz^T x and db: split s holds those of its share of the points; add them up in order.

    Args:
        add: add to what dw and db hold instead.
        precision, tiles: as in `launch_forward`. Rows of dz beyond those of x must be zero.

    Raises ValueError for tensors that do not belong together.
    """
    if dz.ndim == 3:
        dz, dw, db = dz[None], dw[None], None if db is None else db[None]
        x = x[None]
    layers, splits, networks, outputs, inputs = dw.shape
    rows = dz.shape[2]
    check_tensor("dw", dw[0], dw.shape[1:], contiguous=True)
    check_tensor("dz", dz, (layers, networks, None, outputs), FLOATS, rows=True)
    check_precision(precision)
    check_tensor("x", x, (layers, *([networks] if x.ndim == 4 else []), None, inputs), FLOATS)
    if db is not None:
        check_tensor("db", db, (layers, splits, networks, outputs))
        check_tensor("db", db[0], (splits, networks, outputs), contiguous=True)
    check_same_device(dz=dz, x=x, dw=dw, db=db)
    check_networks(layers * splits * networks)
    if dw.numel() == 0:
        return
    t = tiles or tiles_for("weight_gradient", precision, max(outputs, inputs))
    if add:  # sums that are read first take registers
        t = replace(t, inputs=min(t.inputs, 128))
    share = cdiv(cdiv(max(rows, 1), splits), t.points) * t.points
    grid = (cdiv(outputs, t.outputs), cdiv(inputs, t.inputs), layers * splits * networks)
    few = inputs if inputs <= FEW_INPUTS else 0
    full = rows % t.points == 0 and outputs % t.outputs == 0 and (few > 0 or inputs % t.inputs == 0)
    weight_gradient_kernel[grid](
        dz,
        x,
        dw,
        dw if db is None else db,
        networks,
        splits,
        x.shape[-2],
        rows,
        inputs,
        outputs,
        share,
        *dz.stride()[:3],
        x.stride(0),
        *strides_of(x[0]),
        dw.stride(0),
        (dw if db is None else db).stride(0),
        HAS_BIAS=db is not None,
        FEW=few,
        ADD=add,
        EVEN=full and (few > 0 or x.shape[-2] == rows),
        BLOCK_P=t.points,
        BLOCK_O=t.outputs,
        BLOCK_K=16 if few else t.inputs,
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages, alone=True),  # see splits_for
    )


def splits_for(rows: int, outputs: int, inputs: int, networks: int, precision: str) -> int:
    """Shares of the points that give two processors in three a weight-gradient program; the same every time.

    `networks` are those of all layers that share a launch.

    These saturate the second-level cache; each further share costs out x in x 4 bytes written and read again. In fp32
    and tf32x3 products take longer than that: every processor gets a program.
    """
    t, processors = tiles_for("weight_gradient", precision, max(outputs, inputs)), current_chip().processors
    busy = processors if precision in ("fp32", "tf32x3") else 2 * processors // 3
    programs = cdiv(outputs, t.outputs) * cdiv(inputs, t.inputs) * networks
    return max(1, min(cdiv(rows, 4 * t.points), busy // programs))


def leaves_idle(rows: int, columns: int, networks: int) -> bool:
    """Whether tiles of 128x128 would leave processors without work."""
    return cdiv(rows, 128) * cdiv(columns, 128) * networks < current_chip().processors


def strides_of(tensor: Tensor) -> tuple[int, ...]:
    """Strides of [N, ...] or of [...], which all networks share."""
    return tensor.stride() if tensor.ndim == 3 else (0, *tensor.stride())


def _first_tensors(first: FewInputs | None, like: Tensor) -> tuple[Tensor, Tensor]:
    return (like, like) if first is None else first


def _first_strides(first: FewInputs | None) -> tuple[int, int, int]:
    return (0, 0, 0) if first is None else (first[0].stride(0), first[0].stride(1), first[1].stride(0))


def _check_product(x: Tensor, w: Tensor, precision: str) -> None:
    check_precision(precision)
    check_tensor("w", w, (None, None, None), FLOATS)
    networks, _, inputs = w.shape
    if x.ndim not in (2, 3):
        raise wrong("x", "shape [P, in] or [N, P, in]", list(x.shape), "See the launcher's docstring.")
    check_tensor("x", x, (networks, None, inputs)[3 - x.ndim :], FLOATS)
    if x.numel() and (x.shape[-1] - 1) * x.stride(-1) >= 2**31:  # kernels count features in 32 bits
        raise wrong("x", "its features within 2^31 elements", f"strides {x.stride()}", "Call .contiguous().")


def check_first(first: FewInputs, x: Tensor, networks: int, units: int) -> None:
    if x.shape[-1] > FEW_INPUTS:
        raise wrong("x", f"at most {FEW_INPUTS} coordinates", x.shape[-1], "Run the first layer as one of its own.")
    check_tensor("first weight", first[0], (networks, units, x.shape[-1]), rows=True)
    check_tensor("first bias", first[1], (networks, units), rows=True)

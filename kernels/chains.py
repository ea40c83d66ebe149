"""Launchers of all layers of one shape at once: a block of points goes through them in one program."""

from torch import Tensor

from .checks import check_networks, check_precision, check_same_device, check_tensor, launch_options, wrong
from .chip import current_chip
from .configs import tiles_for
from .layers import FLOATS, FewInputs, check_first, leaves_idle, strides_of
from .sine_linear import COSINE, NOTHING, forward_chain_kernel
from .sine_linear_backward import gradient_chain_kernel
from .tiles import Tiles


def launch_forward_chain(
    x: Tensor,  # coordinates [P, in] (shared) or [N, P, in]
    first: FewInputs,
    w: Tensor,  # [L, N, H, H], contiguous but for L
    b: Tensor,  # [L, N, H] float32, contiguous but for L
    h: Tensor,  # [1 + L, N, rows, H], contiguous but for L; overwritten
    c: Tensor | None,  # [L, N, rows, H], contiguous but for L; overwritten
    *,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """A first layer and L hidden ones in one launch: h of all, and the cosines of the hidden ones. omega is folded in.

    A block of points goes through all layers in one program, so the tile must be as wide as they are: see `can_chain`.

    Raises ValueError for tensors that do not belong together.
    """
    layers, networks, width, _ = w.shape
    rows, t = h.shape[2], tiles or tiles_for("forward", precision, width)
    check_precision(precision)
    check_first(first, x, networks, width)
    check_tensor("w of a layer", w[0], (networks, width, width), FLOATS, contiguous=True)
    check_tensor("b of a layer", b[0], (networks, width), contiguous=True)
    check_tensor("h", h, (layers + 1, networks, None, width), FLOATS)
    check_tensor("h of a layer", h[0], h.shape[1:], FLOATS, contiguous=True)
    check_tensor("first weight", first[0], (networks, width, x.shape[-1]))
    if c is not None:
        check_tensor("c of a layer", c[0], h.shape[1:], FLOATS, contiguous=True)
    check_same_device(x=x, w=w, b=b, h=h, c=c, first=first[0])
    check_networks(networks)
    if t.outputs != width or rows % t.points or width % t.inputs:
        got = f"{width} and {rows}"
        raise wrong("h", f"{t.outputs} units and whole blocks of {t.points} rows", got, "Run layer by layer.")
    forward_chain_kernel[(rows // t.points, networks)](
        x,
        *first,
        w,
        b,
        h,
        h if c is None else c,
        layers,
        x.shape[-2],
        rows,
        *strides_of(x),
        first[0].stride(0),
        first[1].stride(0),
        w.stride(0),
        b.stride(0),
        h.stride(0),
        0 if c is None else c.stride(0),
        SAVE=(NOTHING if c is None else COSINE).value,
        FEW=x.shape[-1],
        WIDTH=width,
        FIRST_BLOCK=min(width, 64),
        BLOCK_P=t.points,
        BLOCK_K=t.inputs,
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages),
    )


def launch_gradient_chain(
    dz: Tensor,  # [L, N, rows, H], contiguous but for L; the last layer's is read, all others are overwritten
    w: Tensor,  # [L, N, H, H], any strides
    c: Tensor,  # [L, N, rows, H], contiguous but for L
    *,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """dz of L hidden layers in one launch from that of the last: dz of the next one W, times the layer's own cosine.

    A block of points goes through all layers in one program, so the tile must be as wide as they are: see `can_chain`.

    Raises ValueError for tensors that do not belong together.
    """
    layers, networks, width, _ = w.shape
    rows, t = dz.shape[2], tiles or tiles_for("input_gradient", precision, width)
    check_precision(precision)
    check_tensor("w", w, (layers, networks, width, width), FLOATS)
    for name, tensor in (("dz", dz), ("c", c)):
        check_tensor(name, tensor, (layers, networks, None, width), FLOATS)
        check_tensor(f"{name} of a layer", tensor[0], dz.shape[1:], FLOATS, contiguous=True)
    check_same_device(dz=dz, w=w, c=c)
    check_networks(networks)
    if t.inputs != width or rows % t.points or width % t.outputs:
        got = f"{width} and {rows}"
        raise wrong("dz", f"{t.inputs} units and whole blocks of {t.points} rows", got, "Run layer by layer.")
    gradient_chain_kernel[(rows // t.points, networks)](
        dz,
        w,
        c,
        layers,
        rows,
        dz.stride(0),
        *w.stride(),
        c.stride(0),
        WIDTH=width,
        BLOCK_P=t.points,
        BLOCK_O=t.outputs,
        PRECISION=precision,
        TARGET=current_chip().target,
        **launch_options(t.warps, t.stages),
    )


def can_chain(kernel: str, rows: int, width: int, networks: int, precision: str) -> bool:
    """Whether `launch_forward_chain` ("forward") or `launch_gradient_chain` ("input_gradient") takes such layers.

    A tile must be as wide as a layer, and as many programs be there as fill the chip.
    """
    t = tiles_for(kernel, precision, width)
    across, along = (t.outputs, t.inputs) if kernel == "forward" else (t.inputs, t.outputs)
    return across == width and rows % t.points == 0 and width % along == 0 and not leaves_idle(rows, width, networks)

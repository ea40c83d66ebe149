"""What every launcher checks before it launches, and how it says what is wrong."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .chip import current_chip, is_interpreted
from .mm import PRECISIONS

MOST_NETWORKS = 65535
"""Of a launch: what the second and third axis of CUDA's grids hold."""

MOST_REGISTERS = 255
"""A thread of NVIDIA's can have."""


def cdiv(number: int, size: int) -> int:
    """How many blocks of a size hold so many."""
    return -(-number // size)


def wrong(name: str, expected: str, got: object, fix: str) -> ValueError:
    """The one form of a launcher's error."""
    return ValueError(f"{name}: expected {expected}, got {got}. {fix}")


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int | None],  # None: any size
    dtypes: Sequence[torch.dtype] = (torch.float32,),
    *,
    contiguous: bool = False,
    rows: bool = False,
) -> None:
    """Shape, dtype, memory layout (`rows`: the last axis contiguous) and a device that kernels can run on.

    Raises ValueError.
    """
    fits = len(shape) == tensor.ndim and all(w is None or w == g for w, g in zip(shape, tensor.shape, strict=True))
    if not fits:
        want = "[" + ", ".join("*" if w is None else str(w) for w in shape) + "]"
        raise wrong(name, f"shape {want}", list(tensor.shape), "See the launcher's docstring.")
    if tensor.dtype not in dtypes:
        raise wrong(name, " or ".join(map(str, dtypes)), tensor.dtype, "Convert it with .to().")
    if (contiguous and not tensor.is_contiguous()) or (rows and tensor.numel() and tensor.stride(-1) != 1):
        what = "a contiguous tensor" if contiguous else "a tensor with a contiguous last axis"
        raise wrong(name, what, f"strides {tensor.stride()}", "Call .contiguous().")
    check_device(name, tensor)


def check_networks(networks: int) -> None:
    """A number of networks that a grid can have.

    Raises ValueError.
    """
    if networks > MOST_NETWORKS:
        raise wrong("networks", f"at most {MOST_NETWORKS} in a launch", networks, "Split the stack.")


def check_device(name: str, tensor: Tensor) -> None:
    """A CUDA device, or the CPU under the interpreter; meta tensors are for ahead-of-time compilation.

    Raises ValueError.
    """
    kind = tensor.device.type
    if kind in ("cuda", "meta") or (kind == "cpu" and is_interpreted()):
        return
    raise wrong(name, "a tensor on a CUDA device", str(tensor.device), "Move it there with .cuda().")


def check_same_device(**tensors: Tensor | None) -> None:
    """All on one device.

    Raises ValueError.
    """
    devices = {name: str(t.device) for name, t in tensors.items() if t is not None}
    if len(set(devices.values())) > 1:
        raise wrong("tensors", "one device for all", devices, "Move them to one with .to().")


def launch_options(warps: int, stages: int, *, alone: bool = False) -> dict[str, int]:
    """Of a launch; the interpreter has none.

    Args:
        warps, stages: of the tiles.
        alone: whether a processor has one program of the launch anyway: NVIDIA's assembler would rather spill a few
            bytes than use registers which leave room for more.
    """
    target = current_chip().target
    if target == "interpreter":
        return {}
    most = {"maxnreg": MOST_REGISTERS} if alone and target == "cuda" else {}
    return {"num_warps": warps, "num_stages": stages, **most}


def check_size(name: str, tensor: Tensor | None, dtype: torch.dtype, size: int) -> None:
    """That a flat buffer has at least `size` elements; None will do for none.

    Raises ValueError.
    """
    if tensor is None and size == 0:
        return
    if tensor is None or tensor.ndim != 1 or len(tensor) < size:
        got = None if tensor is None else f"shape {list(tensor.shape)}"
        raise wrong(name, f"a flat tensor of at least {size} elements", got, "Allocate it at the size stated.")
    check_tensor(name, tensor, (None,), (dtype,), contiguous=True)


def check_precision(precision: str) -> None:
    """One of mm.PRECISIONS.

    Raises ValueError.
    """
    if precision not in PRECISIONS:
        raise wrong("precision", f"one of {', '.join(PRECISIONS)}", repr(precision), "Choose one of these.")

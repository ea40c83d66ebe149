"""The native CPU engine: loads the library built from the C++ files here and calls it with tensors.

Tensors in, tensors out, float32 on the CPU; every check of shapes is the caller's (strainer_fast.ops). The library is
optional: where no compiler was at hand, `library()` is None and `missing()` says why.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

LEVELS = ("avx512", "avx2", "portable")
"""Instruction sets with kernels of their own, best first."""

INTERFACE = 1
"""Version of what crosses extern "C"; a library of another one is not used."""

_forced: str | None = None


class Sweep(ctypes.Structure):
    """SfSweep of sweep.cpp."""

    _fields_ = [
        ("num_points", ctypes.c_int64),
        ("num_signals", ctypes.c_int64),
        ("channels", ctypes.c_int64),
        ("num_layers", ctypes.c_int64),
        ("num_shared", ctypes.c_int64),
        ("widths", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("omegas", ctypes.c_void_p),
        ("points", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("value_strides", ctypes.c_int64 * 3),
        ("point_weights", ctypes.c_void_p),
        ("point_weight_strides", ctypes.c_int64 * 2),
        ("scale", ctypes.c_void_p),
        ("dweights", ctypes.c_void_p),
        ("dbiases", ctypes.c_void_p),
        ("dpoints", ctypes.c_void_p),
        ("losses", ctypes.c_void_p),
        ("tile", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("kernels", ctypes.c_char_p),
    ]


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    spec: ModuleSpec | None = find_spec(f"{__name__}._engine")
    if spec is None or spec.origin is None or not Path(spec.origin).exists():
        return None, "not built: no C++ compiler (g++ or clang++) worked when strainer_fast was installed"
    try:
        found = ctypes.CDLL(spec.origin)
        version = int(found.sf_interface())
    except (OSError, AttributeError) as error:
        return None, f"does not load: {error}"
    if version != INTERFACE:
        return None, f"is of another version (interface {version}, expected {INTERFACE}): install strainer_fast again"
    return found, ""


def library() -> ctypes.CDLL | None:
    """The loaded library; None where it was not built or does not load."""
    return _load()[0]


def missing() -> str:
    """Why there is no library; empty where there is one."""
    return _load()[1]


def available() -> list[str]:
    """Levels that this CPU and this build have, best first; empty without the library."""
    lib = library()
    return [] if lib is None else [name for name in LEVELS if lib.sf_has_kernels(name.encode())]


@functools.cache
def _best() -> str | None:
    return next(iter(available()), None)


def level() -> str | None:
    """The instruction set in use; None without the library."""
    return _forced or _best()


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Within, this level runs whatever the CPU could do; for tests and measurements.

    Raises ValueError for a level that is not available.
    """
    global _forced
    if name not in available():
        raise ValueError(f"level: expected one of {available()}, got {name!r}")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element is; None for none."""
    return None if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """An array of pointers, null for none."""
    return (ctypes.c_void_p * len(tensors))(*[address(t) for t in tensors])


def check(code: int) -> None:
    """Turn a result code of the library into an exception."""
    if code == 1:
        raise RuntimeError(f"the native library has no kernels for {level()!r} on this CPU")
    if code == 2:
        raise MemoryError("the native engine got no memory or no thread from the system")


def sweep(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C], any strides
    weights: Sequence[Tensor],  # [out, in], from `num_shared` on [N, out, in]
    biases: Sequence[Tensor],
    omegas: Sequence[float],  # one per layer; the head's is 1
    num_shared: int,
    scale: Tensor,  # [N]
    point_weights: Tensor | None,  # [N, P], any strides
    *,
    losses: Tensor,  # [N] float64, out: sums of squares
    dweights: Sequence[Tensor | None],  # out, shaped as the weights
    dbiases: Sequence[Tensor | None],  # out
    dpoints: Tensor | None,  # [P, in], added to
    threads: int,
    tile: int = 0,
) -> None:
    """One training step; all but `values` and `point_weights` contiguous. The GIL is released meanwhile."""
    lib = library()
    if lib is None:
        raise RuntimeError(f"the native engine is missing: it {missing()}")
    widths = torch.tensor([points.shape[1], *(w.shape[-2] for w in weights)])
    each = torch.tensor(omegas)
    tensors = [addresses(list(group)) for group in (weights, biases, dweights, dbiases)]
    of_layers = [ctypes.cast(pointers, ctypes.c_void_p) for pointers in tensors]
    weighting = (0, 0) if point_weights is None else point_weights.stride()
    task = Sweep(
        points.shape[0],
        values.shape[0],
        values.shape[2],
        len(weights),
        num_shared,
        widths.data_ptr(),
        of_layers[0],
        of_layers[1],
        each.data_ptr(),
        points.data_ptr(),
        values.data_ptr(),
        (ctypes.c_int64 * 3)(*values.stride()),
        address(point_weights),
        (ctypes.c_int64 * 2)(*weighting),
        scale.data_ptr(),
        of_layers[2],
        of_layers[3],
        address(dpoints),
        losses.data_ptr(),
        tile,
        threads,
        (level() or "").encode(),
    )
    check(lib.sf_sweep(ctypes.byref(task)))


def sincos(x: Tensor, sine: Tensor, cosine: Tensor) -> None:
    """The engine's own sine and cosine of a contiguous tensor, into two others."""
    lib = library()
    if lib is None:
        raise RuntimeError(f"the native engine is missing: it {missing()}")
    code = lib.sf_sincos(
        (level() or "").encode(),
        ctypes.c_void_p(x.data_ptr()),
        ctypes.c_void_p(sine.data_ptr()),
        ctypes.c_void_p(cosine.data_ptr()),
        ctypes.c_int64(x.numel()),
    )
    check(code)

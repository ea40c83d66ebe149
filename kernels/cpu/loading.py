"""The native library: found, loaded once, and asked what it can do."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .interface import VERSION, Fit, Sweep

LEVELS = ("avx512", "avx2", "portable")
"""Instruction sets with kernels of their own, best first."""

_forced: str | None = None


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    spec: ModuleSpec | None = find_spec(f"{__package__}._engine")
    if spec is None or spec.origin is None or not Path(spec.origin).exists():
        return None, "not built: no C++ compiler (g++ or clang++) worked when strainer_fast was installed"
    try:
        found = ctypes.CDLL(spec.origin)
        structs = [ctypes.c_int64(ctypes.sizeof(struct)) for struct in (Sweep, Fit)]
        version = int(found.sf_interface(*structs))
    except (OSError, AttributeError) as error:
        return None, f"not loaded: {error}"
    if version != VERSION:
        return None, f"of another version (interface {version}, expected {VERSION}): install strainer_fast again"
    pool = _pytorchs_pool()
    if pool is not None:
        found.sf_use_pool(ctypes.cast(pool.GOMP_parallel, ctypes.c_void_p))
    return found, ""


def _pytorchs_pool() -> ctypes.CDLL | None:
    """The libgomp that PyTorch's CPU operations run on, where that is what they run on (Linux)."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return None
    loaded = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    home = str(Path(torch.__file__).parent.parent)  # torch/lib, or torch.libs beside it
    own = [path for path in loaded if path.startswith(home)]
    if len(own or loaded) != 1:
        return None
    try:
        pool = ctypes.CDLL((own or list(loaded))[0])
        return pool if hasattr(pool, "GOMP_parallel") else None
    except OSError:
        return None


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
    """Within, this level runs whatever the CPU could do; for tests and measurements, of the whole process.

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


def chosen() -> bytes:
    """The level in use, as the library wants to be told."""
    return (level() or "").encode()


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element is; None for none."""
    return None if tensor is None else tensor.data_ptr()


def addresses(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """An array of pointers, null for none."""
    return (ctypes.c_void_p * len(tensors))(*[address(t) for t in tensors])


def sizes(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """An array of int64; not a tensor, whose dtype and device have defaults that callers change."""
    return (ctypes.c_int64 * len(values))(*values)


def reals(values: Sequence[float]) -> ctypes.Array[ctypes.c_float]:
    """An array of float32."""
    return (ctypes.c_float * len(values))(*values)


def pointer(array: ctypes.Array[Any]) -> ctypes.c_void_p:
    """To the first element; the array must outlive it."""
    return ctypes.cast(array, ctypes.c_void_p)


def call(function: str, *arguments: object) -> None:
    """Call a function of the library, the GIL released; its result code becomes an exception."""
    lib = library()
    if lib is None:
        raise RuntimeError(f"the native engine is {missing()}")
    code = lib[function](*arguments)
    if code == 1:
        raise RuntimeError(f"the native library has no kernels for {level()!r} on this CPU")
    if code == 2:
        raise MemoryError("the native engine got no memory or no thread from the system")

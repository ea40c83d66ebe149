"""Which chip the kernels are launched on: what sizes of tiles and which instructions are chosen by."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
from triton.runtime.interpreter import InterpretedFunction


@dataclass(frozen=True)
class Chip:
    """A target of the kernels."""

    target: str  # "cuda", "hip" or "interpreter"
    arch: int | str  # 80, 90, ... for cuda, "gfx942" for hip, 0 for the interpreter
    processors: int  # multiprocessors (compute units), 1 for the interpreter
    shared: int  # bytes of shared memory a block may have

    @property
    def name(self) -> str:
        """sm_90, gfx942 or interpreter."""
        return f"sm_{self.arch}" if self.target == "cuda" else str(self.arch) or self.target


INTERPRETER = Chip("interpreter", "interpreter", 1, 2**30)

CHIPS = {
    chip.name: chip
    for chip in (
        Chip("cuda", 80, 108, 163 * 1024),  # A100
        Chip("cuda", 86, 84, 99 * 1024),  # RTX 30, A6000
        Chip("cuda", 89, 128, 99 * 1024),  # RTX 40, L40
        Chip("cuda", 90, 132, 227 * 1024),  # H100, H200
        Chip("cuda", 100, 148, 227 * 1024),  # B200
        Chip("cuda", 120, 170, 99 * 1024),  # RTX 50
        Chip("hip", "gfx942", 304, 64 * 1024),  # MI300
    )
}
"""The chips that `make aot` compiles for, by name."""

_assumed: ContextVar[Chip | None] = ContextVar("chip", default=None)


@triton.jit
def _probe():
    pass


def is_interpreted() -> bool:
    """Whether Triton was loaded in interpreter mode (TRITON_INTERPRET=1 before its import)."""
    return isinstance(_probe, InterpretedFunction)


@contextmanager
def assume(chip: Chip) -> Iterator[None]:
    """Within, launchers choose as on `chip`: for ahead-of-time compilation, where nothing is launched."""
    token = _assumed.set(chip)
    try:
        yield
    finally:
        _assumed.reset(token)


def current_chip() -> Chip:
    """The chip of the current CUDA device, the interpreter, or what `assume` says."""
    assumed = _assumed.get()
    if assumed is not None:
        return assumed
    return INTERPRETER if is_interpreted() else _device_chip(torch.cuda.current_device())


_known: dict[int, Chip] = {}


def _device_chip(device: int) -> Chip:
    if device not in _known:
        has = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch: int | str = str(has.gcnArchName).split(":")[0]
            _known[device] = Chip("hip", arch, has.multi_processor_count, 64 * 1024)
        else:
            arch = 10 * has.major + has.minor
            shared = getattr(has, "shared_memory_per_block_optin", CHIPS["sm_86"].shared)
            _known[device] = Chip("cuda", arch, has.multi_processor_count, shared)
    return _known[device]

"""What the host asks of the device, counted where it is asked."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = (
    str(ROOT / ".venv"),
    *(str(Path(__file__).with_name(f"{n}.py")) for n in ("counts", "device", "graphs", "tensors")),
)


@dataclass
class Counts:
    """Counters of what was asked, by "what at file:line"; the line is the innermost one of this project.

    Attributes:
        operations: of PyTorch, views excepted, asked for one by one by the host.
        launches: of Triton kernels from Python.
        synchronisations: the host waits for the device.
        captures, replays: of CUDA graphs.
        replayed: operations and launches that replays did, without the host; by name alone.
    """

    operations: Counter[str] = field(default_factory=Counter)
    launches: Counter[str] = field(default_factory=Counter)
    synchronisations: Counter[str] = field(default_factory=Counter)
    captures: Counter[str] = field(default_factory=Counter)
    replays: Counter[str] = field(default_factory=Counter)
    replayed: Counter[str] = field(default_factory=Counter)

    def total(self, name: str) -> int:
        """Of one counter."""
        return sum(getattr(self, name).values())

    def per(self, steps: int) -> dict[str, float]:
        """All totals per step."""
        return {name: self.total(name) / steps for name in vars(self)}


_active: list[Counts] = []


@contextmanager
def counted() -> Iterator[Counts]:
    """Counts of what is asked within."""
    counts = Counts()
    _active.append(counts)
    try:
        yield counts
    finally:
        _active.remove(counts)


def note(counter: str, what: str, sited: bool = True) -> None:
    """One more of `what`."""
    if _active:
        key = f"{what} at {site()}" if sited else what
        for counts in _active:
            getattr(counts, counter)[key] += 1


def site() -> str:
    """The innermost line of this project that led here."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(str(ROOT)) and not name.startswith(SKIPPED):
            return f"{name[len(str(ROOT)) + 1 :].removeprefix('strainer_fast/')}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"

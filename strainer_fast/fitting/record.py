"""What is known about a signal while it is fitted, and what a look at the loss tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from strainer_fast.models import Siren

TARGET, EXACT, BUDGET, NON_FINITE = "target", "exact", "budget", "non_finite"
DIVERGED, INTERRUPTED = "diverged", "interrupted"
"""Why a signal stopped: target PSNR reached, every rounded value right, all steps done, loss not finite, a spike after
a roll-back, Ctrl-C."""


@dataclass(frozen=True)
class Curve:
    """PSNR of one signal before each step; entry t belongs to the weights after t steps.

    NaN where it was not measured: a step saw some of the points only, and nobody looked.
    """

    psnr: NDArray[np.float32]  # [steps + 1], dB
    seconds: NDArray[np.float32]  # [steps + 1], since its fit began, its start included; interpolated between looks


@dataclass(frozen=True)
class Progress:
    """What the loop knows when it looks at the loss."""

    step: int  # of the running signal that has done most
    steps: int
    running: list[int]  # indices of the signals still in the stack
    psnr: list[float]  # dB, one per running signal
    seconds: float
    module: Callable[[int], Siren]  # the network of a running signal as it is now (a copy), by its index
    done: list[int]  # steps, one per running signal: signals may join a stack that is under way


@dataclass
class Record:
    """What happened to one signal so far."""

    index: int  # the caller's
    began: float = 0.0  # on the clock of its run
    steps: int = 0  # behind the weights that are kept
    reason: str = ""  # why it stopped
    seconds: float = 0.0  # from `began` to its stop
    mse: list[float] = field(default_factory=list)  # before each step
    clock: list[tuple[int, float]] = field(default_factory=list)  # (step, seconds since `began`) at each look

    def stop(self, reason: str, seconds: float) -> None:
        """It stops with the weights behind the last loss that is noted."""
        self.steps, self.reason, self.seconds = max(len(self.mse) - 1, 0), reason, seconds

    def curve(self) -> Curve:
        """PSNR and seconds by step."""
        mse = np.asarray(self.mse, dtype=np.float32)
        with np.errstate(divide="ignore"):
            psnr = np.asarray(-10 * np.log10(mse), dtype=np.float32)
        at, seconds = zip(*self.clock, strict=True)
        clock = np.interp(np.arange(len(mse)), at, seconds)
        if self.reason:  # a look may come later than the stop
            clock = np.minimum(clock, self.seconds)
        return Curve(psnr, clock.astype(np.float32))


@dataclass(frozen=True)
class Look:
    """A look at the loss inside the package, before networks are given their outer form."""

    records: Sequence[Record]  # of the running signals; the losses of this step are in them
    done: list[int]  # steps, one per running signal
    psnr: list[float]
    seconds: float
    parameters: Callable[[], list[Tensor]]  # of the running signals, before this step's update

    def progress(self, steps: int, module: Callable[[int], Siren]) -> Progress:
        """What the caller's callback sees."""
        running = [record.index for record in self.records]
        return Progress(max(self.done), steps, running, self.psnr, self.seconds, module, self.done)

"""The optimisation loop: one function for fits (N independent networks) and pre-training (N coupled signals)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strainer_fast.fitting.guard import Guard
from strainer_fast.fitting.meta import MetaStepper
from strainer_fast.fitting.optim import Optimiser
from strainer_fast.fitting.optimisers import make_optimiser
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.sampling import Sampler
from strainer_fast.fitting.schedule import Plateau
from strainer_fast.fitting.stepper import make_stepper
from strainer_fast.models import Siren

TARGET, EXACT, BUDGET, NON_FINITE = "target", "exact", "budget", "non_finite"
DIVERGED, INTERRUPTED = "diverged", "interrupted"
"""Why a signal stopped: target PSNR reached, every rounded value right, all steps done, loss not finite, a spike after
a roll-back, Ctrl-C."""

EXACT_FROM_DB = 50.0
"""Values are compared from here on only: it takes an evaluation of the network, which is all but never exact below."""


@dataclass(frozen=True)
class Curve:
    """PSNR of one signal before each step; entry t belongs to the weights after t steps.

    NaN where it was not measured: a step saw some of the points only, and nobody looked.
    """

    psnr: NDArray[np.float32]  # [steps + 1], dB
    seconds: NDArray[np.float32]  # [steps + 1], since the fit began, its start included; interpolated between checks


@dataclass(frozen=True)
class Progress:
    """What the loop knows when it looks at the loss."""

    step: int
    steps: int
    running: list[int]  # indices of the signals still in the stack
    psnr: list[float]  # dB, one per running signal
    seconds: float
    module: Callable[[int], Siren]  # the network of a running signal as it is now (a copy), by its index


@dataclass(frozen=True)
class Look:
    """The same inside the package, before indices and networks are given their outer meaning."""

    step: int
    running: list[int]  # rows of the stack as it began
    psnr: list[float]
    seconds: float
    trace: Trace  # holds the loss of this step too
    parameters: list[Tensor]  # of the running rows, before this step's update

    def progress(self, steps: int, running: list[int], module: Callable[[int], Siren]) -> Progress:
        """What the caller's callback sees."""
        return Progress(self.step, steps, running, self.psnr, self.seconds, module)


@dataclass
class Trace:
    """What happened to each signal of a stack."""

    steps: list[int]
    reasons: list[str]
    seconds: list[float]
    curves: list[list[float]]  # MSE per step
    clock: list[tuple[int, float]] = field(default_factory=list)  # (step, seconds) at each check

    def curve(self, index: int) -> Curve:
        """The PSNR curve of signal `index`."""
        mse = np.asarray(self.curves[index], dtype=np.float32)
        with np.errstate(divide="ignore"):
            psnr = np.asarray(-10 * np.log10(mse), dtype=np.float32)
        at, seconds = zip(*self.clock, strict=True)
        clock = np.interp(np.arange(len(mse)), at, seconds)
        if self.reasons[index]:  # a look may come later than the stop
            clock = np.minimum(clock, self.seconds[index])
        return Curve(psnr, clock.astype(np.float32))


def optimise(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    parameters: list[Tensor],  # leaves; updated in place
    omegas: Sequence[float],
    recipe: Recipe,
    *,
    implementation: str,
    precision: str = "fp32",
    steps: int,
    independent: bool,
    target_psnr: float | None = None,
    shape: Sequence[int] | None = None,
    num_frozen: int = 0,
    optimiser: Optimiser | None = None,
    mse_so_far: Sequence[Sequence[float]] = (),
    begin: float | None = None,
    stop: Callable[[], bool] = lambda: False,
    on_check: Callable[[Look], None] = lambda look: None,
    on_leave: Callable[[list[int], list[Tensor], Trace], None] = lambda rows, parameters, trace: None,
) -> tuple[list[Tensor], Trace]:
    """Run the recipe's optimiser until every signal has stopped.

    Args:
        implementation, precision: what computes a step; see `strainer_fast.fitting.stepper`.
        independent: True for N stacked networks, each of which stops on its own and leaves the stack; False for
            shared parameters, where all signals stop together and one non-finite loss stops all.
        shape: samples per axis, for recipes that sample points; None takes all points in every step.
        num_frozen: layers that were cut off before these; `points` are then their features.
        optimiser: with the state to continue from; fresh by default.
        mse_so_far: with `optimiser`, the losses of the steps already done, per signal.
        begin: time.perf_counter() that seconds are counted from; now, by default.
        stop: asked before every step; True ends the loop there.
        on_check: called at every look at the loss with what was seen, before the optimiser moves on.
        on_leave: called when signals of an independent stack stop, with their rows, all final parameters so far and
            the trace.

    Returns:
        The final parameters, row n being signal n's last weights with a finite loss, and the trace.
    """
    num_signals = values.shape[0]
    count = num_signals if independent else None
    optimiser = optimiser or make_optimiser(parameters, recipe, count, points, omegas, num_frozen)
    first = len(mse_so_far[0]) if mse_so_far else 0
    trace = Trace(
        [0] * num_signals,
        [""] * num_signals,
        [0.0] * num_signals,
        [list(c) for c in mse_so_far] or [[] for _ in values],
    )
    final = [p.detach().clone() for p in parameters]
    running = list(range(num_signals))
    guard = Guard(parameters, recipe.guard_db) if recipe.guard_db is not None and independent else None
    plateau = Plateau(num_signals) if recipe.schedule == "plateau" and independent else None
    sampler = None
    if shape is not None and recipe.sampling != "full":
        sampler = Sampler(recipe, shape, points.device)
    meta = not independent and recipe.pretrain_method != "strainer"
    stepper = (MetaStepper if meta else make_stepper)(
        points,
        values,
        parameters,
        omegas,
        optimiser,
        implementation=implementation,
        precision=precision,
        independent=independent,
        keep=guard is None,
        sampler=sampler,
    )
    pending: list[Tensor] = []  # losses not yet seen by the host
    measured: list[bool] = []  # on all points
    begin = time.perf_counter() if begin is None else begin
    diverged: list[int] = []  # rows, by the guard
    spiked: list[int] = []

    for step in range(first, steps + 1):
        interrupted = stop()
        pending.append(stepper.evaluate(step, step < steps))
        measured.append(stepper.on_all_points)

        if step % recipe.check_every == 0 or step == steps or interrupted:
            if not measured[-1]:
                pending[-1], measured[-1] = stepper.measure(), True
            elif sampler is not None:
                sampler.look(float(-10 * pending[-1].log10()), None)
            seen = torch.stack(pending).cpu().double().numpy()  # [checked steps, running]
            known = np.array(measured)
            pending.clear()
            measured.clear()
            stepper.look()
            now = time.perf_counter() - begin
            trace.clock.append((step, now))
            with np.errstate(divide="ignore", invalid="ignore"):
                psnr = -10 * np.log10(seen[-1])
            diverged, spiked = ([], []) if guard is None else guard.look(seen[-1], stepper.parameters, step == steps)
            bad = ~np.isfinite(seen) if guard is None else np.zeros(seen.shape, dtype=bool)
            if not independent:
                bad |= bad.any(axis=1, keepdims=True)
            near = np.flatnonzero(psnr >= EXACT_FROM_DB).tolist() if recipe.until_exact and independent else []
            exact = stepper.exact(near)
            leaving = []
            for row, signal in enumerate(running):
                ok = int(bad[:, row].argmax()) if bad[:, row].any() else len(seen)
                trace.curves[signal].extend(np.where(known, seen[:, row], np.nan)[:ok])
                reached = target_psnr is not None and psnr[row] >= target_psnr
                finite = ok == len(seen)
                reason = _reason(finite, row in diverged, reached, row in exact, step == steps, interrupted)
                if reason is not None:
                    trace.steps[signal] = max(len(trace.curves[signal]) - 1, 0)
                    trace.reasons[signal], trace.seconds[signal] = reason, now
                    leaving.append(row)
            on_check(Look(step, list(running), psnr.tolist(), now, trace, stepper.parameters))
            if leaving and not independent:
                return stepper.last_finite(), trace
            last_finite = stepper.last_finite() if leaving else []
            for row in leaving:
                source = guard.best if guard and row in (*diverged, *spiked) else last_finite
                for out, kept in zip(final, source, strict=True):
                    out[running[row]] = kept[row]
            if leaving:
                on_leave([running[row] for row in leaving], final, trace)
            if len(leaving) == len(running):
                return final, trace
            if plateau is not None:
                optimiser.halvings[plateau.look(psnr)] += 1
            if leaving:
                rest = [row for row in range(len(running)) if row not in leaving]
                running = [running[row] for row in rest]
                stepper = stepper.select(torch.tensor(rest, device=values.device))
                if plateau is not None:
                    plateau.select(rest)
                if guard is not None:
                    guard.select(rest)
                    spiked = [rest.index(row) for row in spiked if row in rest]

        stepper.update()
        if guard is not None and spiked:
            stepper.look()
            guard.roll_back(spiked, stepper.parameters, optimiser)
            stepper.changed()
            spiked = []
    raise AssertionError("unreachable: the last step is a check that every signal leaves at")


def _reason(finite: bool, diverged: bool, reached: bool, exact: bool, last: bool, interrupted: bool) -> str | None:
    """Why a signal stops now; None while it goes on."""
    if not finite:
        return NON_FINITE
    if diverged:
        return DIVERGED
    if reached:
        return TARGET
    if exact:
        return EXACT
    if last:
        return BUDGET
    return INTERRUPTED if interrupted else None

"""The loop of fits: a stack of independent networks that advance together; one that stops makes room for the next."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strainer_fast.fitting.guard import Guard
from strainer_fast.fitting.losses import Losses
from strainer_fast.fitting.optimisers import make_optimiser
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.record import BUDGET, DIVERGED, EXACT, INTERRUPTED, NON_FINITE, TARGET, Look, Record
from strainer_fast.fitting.sampling import Sampler
from strainer_fast.fitting.schedule import Plateau
from strainer_fast.fitting.steppers import make_stepper

EXACT_FROM_DB = 50.0
"""Values are compared from here on only: it takes an evaluation of the network, which is all but never exact below."""

REFILL_SHARE = 8
"""Networks join once this part of the stack is free: joining copies the whole of it."""


COMPACT_SHARE = 1 / 8
"""On a GPU those that have stopped keep their places until they are so many: the copy records its launches anew."""


@dataclass(frozen=True)
class Job:
    """What all networks of a run share.

    Args:
        points: [P, in] of a grid of `shape`, or their features behind the first `num_frozen` layers.
        omegas: of the sine layers that are trained.
        implementation, precision: what computes a step; see `strainer_fast.fitting.steppers`.
    """

    points: Tensor
    shape: Sequence[int]
    omegas: Sequence[float]
    recipe: Recipe
    implementation: str
    precision: str
    num_frozen: int = 0


@dataclass(frozen=True)
class Batch:
    """Networks that begin together."""

    records: list[Record]
    values: Tensor  # [N, P, C]
    parameters: list[Tensor]  # leaves, stacked [N, ...]; updated in place


@dataclass(frozen=True)
class Watch:
    """Who looks at a run.

    Args:
        begin: time.perf_counter() that seconds are counted from.
        stop: asked before every step; True stops all that run, and takes no more.
        on_check: called at every look at the loss with what was seen, before the optimiser moves on.
        on_leave: called when networks stop, with their records and their stacked parameters: of each its last weights
            with a finite loss, or its best ones where the guard says so.
    """

    begin: float
    stop: Callable[[], bool]
    on_check: Callable[[Look], None]
    on_leave: Callable[[list[Record], list[Tensor]], None]


def run(job: Job, size: int, feed: Callable[[int], Batch | None], watch: Watch) -> None:
    """Fit networks, at most `size` of them at a time, until `feed` gives None instead of up to so many that begin."""
    stack: Stack | None = None
    more = True
    while True:
        interrupted = watch.stop()
        if stack is not None:
            stack.evaluate()
            stack = stack.look_where_due(interrupted, watch)
        # Signals join at looks only, so that all are looked at together.
        while more and not interrupted and (stack is None or stack.looked):
            room = size - (0 if stack is None else stack.number)
            if room < max(1, size // REFILL_SHARE):
                break
            if stack is not None and stack.is_behind:
                stack = stack.look(False, watch)
                continue  # with what room there is now
            batch = feed(room)
            more = batch is not None
            if batch is not None:
                new = Stack(job, batch)
                new.evaluate()
                left = new.look(False, watch)
                stack = left if stack is None else stack.join(left)
        if stack is None:
            return
        stack.update()


class Stack:
    """Networks that advance together, and all that is known about each.

    On a GPU a look stops nothing: the losses of a step are seen while the device works on the next one, and networks
    that stop hand out the weights of the step that was seen (`_lags`). They stay in their places, moved on for nothing,
    until so many have stopped that it pays to copy the rest (`COMPACT_SHARE`).
    """

    def __init__(self, job: Job, batch: Batch) -> None:
        self.job, self.records = job, batch.records
        recipe, number = job.recipe, len(batch.records)
        self.age = np.zeros(number, dtype=np.int64)  # steps done
        self.runs = np.ones(number, dtype=np.bool_)  # which have not stopped
        self.guard = None if recipe.guard_db is None else Guard(batch.parameters, recipe.guard_db)
        self.plateau = Plateau(number) if recipe.schedule == "plateau" else None
        self.sampler = None
        if recipe.sampling != "full":
            self.sampler = Sampler(recipe, job.shape, job.points.device)
        self.optimiser = make_optimiser(batch.parameters, recipe, number, job.points, job.omegas, job.num_frozen)
        self.stepper = make_stepper(
            job.points,
            batch.values,
            batch.parameters,
            job.omegas,
            self.optimiser,
            implementation=job.implementation,
            precision=job.precision,
            independent=True,
            keep=self.guard is None,
            sampler=self.sampler,
        )
        self.spiked: list[int] = []  # rows that go back to their best weights after this step
        self.looked = False  # since the last step
        self._losses = Losses()

    @property
    def number(self) -> int:
        """Of networks that have not stopped."""
        return int(self.runs.sum())

    @property
    def is_behind(self) -> bool:
        """Whether there are losses that no look has seen."""
        return self._losses.unseen

    @property
    def _lags(self) -> bool:
        """Whether looks may come a step late: where nothing that they find changes the next step."""
        recipe = self.job.recipe
        decides = self.guard is not None or self.plateau is not None or self.sampler is not None or recipe.until_exact
        return self.stepper.can_look_behind and not decides

    def evaluate(self) -> None:
        """Losses and gradients of the weights as they are."""
        self.looked = False
        more = bool((self.age < self.job.recipe.steps).any())
        losses = self.stepper.evaluate(int(self.age[0]), more)
        self._losses.add(losses, self.stepper.on_all_points)

    def look_where_due(self, interrupted: bool, watch: Watch) -> Stack | None:
        """See the losses that are to be looked at now; returns what is left, None where that is nothing."""
        recipe = self.job.recipe
        last = bool((self.runs & (self.age == recipe.steps)).any())
        due = bool((self.runs & (self.age % recipe.check_every == 0)).any())
        stack = self._look_behind(watch) if self._losses.under_way else self
        if stack is None:
            return None
        if interrupted or last or (due and not stack._lags):
            return stack.look(interrupted, watch)
        if due:
            stack._losses.send(stack.stepper.watched())
        return stack

    def look(self, interrupted: bool, watch: Watch) -> Stack | None:
        """See all losses, let go of the networks that stop; returns what is left, None where that is nothing."""
        if self.sampler is not None:
            losses, on_all_points = self._losses.last
            if on_all_points:
                self.sampler.look(float(-10 * losses.log10()), None)
            else:
                self._losses.replace_last(self.stepper.measure())
        seen, known = self._losses.take_all()
        self.stepper.look()
        return self._see(seen, known, self.age, interrupted, watch)

    def _look_behind(self, watch: Watch) -> Stack | None:
        """The same for the losses before the last update, while the device goes on."""
        seen, known, watched = self._losses.take()
        self.stepper.look(watched)
        return self._see(seen, known, self.age - 1, False, watch, behind=True)

    def _see(
        self,
        seen: NDArray[np.float64],  # [steps since the last look, N]
        known: list[bool],
        age: NDArray[np.int64],  # [N], of the last of them
        interrupted: bool,
        watch: Watch,
        behind: bool = False,
    ) -> Stack | None:
        recipe = self.job.recipe
        self.looked = True
        now = time.perf_counter() - watch.begin
        with np.errstate(divide="ignore", invalid="ignore"):
            psnr = -10 * np.log10(seen[-1])
        last = age == recipe.steps
        due = self.runs & ((age % recipe.check_every == 0) | last | interrupted)
        diverged: list[int] = []
        if self.guard is not None:
            diverged, self.spiked = self.guard.look(seen[-1], self.stepper.parameters, due, last)
        bad = ~np.isfinite(seen) if self.guard is None else np.zeros(seen.shape, dtype=bool)
        near = np.flatnonzero(due & (psnr >= EXACT_FROM_DB)).tolist() if recipe.until_exact else []
        exact = self.stepper.exact(near)
        leaving = []
        running = np.flatnonzero(self.runs).tolist()
        for row in running:
            record = self.records[row]
            ok = int(bad[:, row].argmax()) if bad[:, row].any() else len(seen)
            record.mse.extend(np.where(known, seen[:, row], np.nan)[:ok])
            record.clock.append((int(age[row]), now - record.began))
            reached = recipe.target_psnr is not None and due[row] and psnr[row] >= recipe.target_psnr
            finite = ok == len(seen)
            reason = _reason(finite, row in diverged, reached, row in exact, bool(last[row]), interrupted)
            if reason is not None:
                record.stop(reason, now - record.began)
                leaving.append(row)

        def parameters() -> list[Tensor]:
            found = self.stepper.before() if behind else self.stepper.parameters
            return found if len(running) == len(self.runs) else [p.detach()[self._index(running)] for p in found]

        records = [self.records[row] for row in running]
        watch.on_check(Look(records, age[running].tolist(), psnr[running].tolist(), now, parameters))
        if self.plateau is not None:
            self.optimiser.halvings[self.plateau.look(psnr, due)] += 1
        if not leaving:
            return self
        found = self.stepper.before() if behind else self.stepper.last_finite()
        watch.on_leave([self.records[row] for row in leaving], self._kept(leaving, {*diverged, *self.spiked}, found))
        self.runs[leaving] = False
        return self._compacted(COMPACT_SHARE if self.job.points.is_cuda else 0.0)

    def _index(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor(rows, device=self.job.points.device)

    def _kept(self, leaving: list[int], to_best: set[int], found: Sequence[Tensor]) -> list[Tensor]:
        """Final parameters of these rows, stacked."""
        index = self._index(leaving)
        out = [p.detach()[index] for p in found]
        for place, row in enumerate(leaving):
            if self.guard is not None and row in to_best:
                for kept, best in zip(out, self.guard.best, strict=True):
                    kept[place] = best[row]
        return out

    def _compacted(self, share: float) -> Stack | None:
        """Without those that have stopped, once they are more than this share; None where no other is there."""
        rest = np.flatnonzero(self.runs).tolist()
        if not rest:
            return None
        if len(rest) == len(self.runs) or len(self.runs) - len(rest) < share * len(self.runs):
            return self
        self.records = [self.records[row] for row in rest]
        self.age, self.runs = self.age[rest], self.runs[rest]
        self.stepper = self.stepper.select(self._index(rest))
        self._losses.select(rest)
        if self.plateau is not None:
            self.plateau.select(rest)
        if self.guard is not None:
            self.guard.select(rest)
        self.spiked = [rest.index(row) for row in self.spiked if row in rest]
        return self

    def join(self, new: Stack | None) -> Stack:
        """Take the networks of another stack after these; both have been looked at."""
        if new is None:
            return self
        self._compacted(0.0)
        new._compacted(0.0)
        self.spiked += [len(self.records) + row for row in new.spiked]
        self.records = [*self.records, *new.records]
        self.age, self.runs = np.concatenate([self.age, new.age]), np.concatenate([self.runs, new.runs])
        self.stepper = self.stepper.join(new.stepper)
        if self.plateau is not None and new.plateau is not None:
            self.plateau.join(new.plateau)
        if self.guard is not None and new.guard is not None:
            self.guard.join(new.guard)
        return self

    def update(self) -> None:
        """One step of all, then the roll-backs that the last look asked for."""
        self.stepper.update()
        self.age += 1
        if self.guard is not None and self.spiked:
            self.stepper.look()
            self.guard.roll_back(self.spiked, self.stepper.parameters, self.optimiser)
            self.stepper.changed()
            self.spiked = []


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

"""What fits signals of one shape, whoever asks: everything that is decided before the first step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strainer_fast._checks import bad_input, bad_type
from strainer_fast.fitting import engine, small, stack
from strainer_fast.fitting.freeze import FrozenFeatures, depth_of
from strainer_fast.fitting.measure import measure_psnr
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.record import Look, Progress, Record
from strainer_fast.fitting.result import FittedSignal
from strainer_fast.fitting.start import (
    check_start,
    initial_stack,
    least_squares_start,
    mean_start,
    resolve_scale,
    signal_seed,
)
from strainer_fast.models import Architecture, BatchedSiren, Encoder, Siren
from strainer_fast.models.siren import siren_from_rows
from strainer_fast.ops import choose, choose_device
from strainer_fast.ops.dispatch import resolve_precision
from strainer_fast.ops.triton import on_device, whole_rounds
from strainer_fast.signals import Signal
from strainer_fast.signals.grid import grid

STACK_ELEMENTS = 2**21
"""Most activations (points x width x signals) of one layer in a stack: wide networks run one by one and finish early,
small ones share their calls, 83 of width 32 on 28x28 points."""

RANDOM = ("siren", "shared")
"""Initialisations without an encoder: each signal its own draw, or one for all."""

GPU_STACK_ELEMENTS = 2**23
"""The same on a GPU, which one image of 178x178 and a network 256 wide keep busy."""


@dataclass(frozen=True)
class Entry:
    """A signal that waits for its fit."""

    index: int  # the caller's
    signal: Signal
    fingerprint: str


@dataclass(frozen=True)
class Fitted:
    """Signals that have stopped together.

    Args:
        indices: the caller's.
        signals: what is known about each.
        records: what happened to each, its losses among it.
        weights: of their networks, stacked [n, ...], named as in BatchedSiren, on the CPU.
    """

    indices: list[int]
    signals: list[FittedSignal]
    records: list[Record]
    weights: dict[str, Tensor]


class Fitter:
    """Fits with one recipe from one initialisation.

    Args: as of `fit`.

    Raises InputError for a recipe or implementation that cannot run from this initialisation.
    """

    def __init__(
        self,
        init: Encoder | str | Path,
        recipe: Recipe,
        architecture: Architecture | None,
        implementation: str,
        device: str,
    ) -> None:
        self.recipe = recipe
        self.device = choose_device(device)
        self.implementation = choose(implementation, self.device).name
        can_skip = recipe.sampling == "full"
        self.precision = resolve_precision(recipe.precision, self.implementation, self.device, can_skip=can_skip)
        self.init = _resolve_init(init, architecture)
        self.shared = init == "shared"
        self.network = self.init.architecture if isinstance(self.init, Encoder) else self.init
        self.frozen = FrozenFeatures(
            self.init if isinstance(self.init, Encoder) else None, depth_of(recipe.freeze, self.init)
        )
        self.whole_fits = small.engine_of(choose(implementation, self.device, whole_fits=True).name, self.device)
        self.settings: dict[str, Any] = {
            "recipe": recipe.as_dict(),
            "init": f"encoder {self.init.fingerprint()}" if isinstance(self.init, Encoder) else str(init),
            "architecture": self.network.as_dict(),
        }

    def environment(self, shapes: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What two runs on signals of these shapes [*grid, C] must share to give the same bits."""
        whole_fits = any(self.is_small(shape) for shape in shapes)
        return engine.environment(self.implementation, self.device, whole_fits, self.precision)

    def check(self, signal: Signal) -> None:
        """Refuse a signal that these fits cannot take, before anything starts.

        Raises InputError for another input dimension than the encoder's, channels that the start cannot give, or a
        step that needs more memory than there is.
        """
        if isinstance(self.init, Encoder) and self.init.in_features != len(signal.shape):
            raise bad_input(
                "signals",
                f"{self.init.in_features} coordinates per point, as the encoder has",
                len(signal.shape),
                "Use another encoder.",
            )
        check_start(self.recipe.start, self.init, [signal.channels])
        size = self.stack_size(signal.values.shape)
        depth = len(self.frozen.layers)
        engine.check_memory(self.implementation, signal, size, False, self.network, self.device, depth)

    def is_small(self, shape: Sequence[int]) -> bool:
        """Whether `ops.fit_small` runs fits of signals of this shape [*grid, C]."""
        *axes, channels = shape
        points = math.prod(axes)
        return self.whole_fits is not None and (
            small.ruled_out(
                *(self.recipe, self.network, len(axes), channels, points), precision=self.precision, device=self.device
            )
            is None
        )

    def stack_size(self, shape: Sequence[int]) -> int:
        """How many signals of this shape [*grid, C] run at a time."""
        if self.recipe.sampling != "full" and not self.is_small(shape):
            return 1  # which points, and how many, follows one signal's progress
        elements = STACK_ELEMENTS if self.device.type == "cpu" else GPU_STACK_ELEMENTS
        size = max(1, elements // (math.prod(shape[:-1]) * self.network.hidden_features))
        free = engine.available_bytes(self.device)
        while size > 1 and free is not None and self._step_bytes(shape, size) > free // 2:
            size //= 2
        if not self.is_small(shape):
            return whole_rounds(size, self.device) if self.implementation == "triton" else size
        if self.whole_fits == "triton":
            return self._programs_full(shape, free)
        return max(size, small.NETWORKS_PER_THREAD * torch.get_num_threads())

    def _programs_full(self, shape: Sequence[int], free: int | None) -> int:
        """Networks that keep all programs of a GPU busy equally long, in half of its memory."""
        from strainer_fast.kernels.small_fits import small_fits_programs

        with on_device(torch.empty(0, device=self.device)):
            programs = small_fits_programs(2**31, self.network.hidden_features, self.precision)
        points, depth = math.prod(shape[:-1]), self.network.num_layers
        # Parameters, two moments, the best ones and the given ones; samples; losses of all steps.
        each = 5 * depth * self.network.hidden_features**2 + points * shape[-1] + self.recipe.steps
        rounds = small.NETWORKS_PER_PROGRAM
        if free is not None:
            rounds = max(1, min(rounds, free // 2 // (4 * each * programs)))
        return rounds * programs

    def _step_bytes(self, shape: Sequence[int], size: int) -> int:
        points = math.prod(shape[:-1])
        return engine.step_bytes(self.implementation, points, shape[-1], size, False, self.network)

    def run(
        self,
        shape: Sequence[int],
        feed: Callable[[int], list[Entry]],
        *,
        size: int | None = None,
        stop: Callable[[], bool],
        on_check: Callable[[Progress], None],
        on_fitted: Callable[[Fitted], None],
    ) -> None:
        """Fit signals of one shape [*grid, C] until no more come.

        Args:
            feed: gives up to so many signals; none when there are no more.
            size: how many at a time; `stack_size` by default.
            stop: asked before every step; True stops all that run.
            on_check: called with what a look at the loss has seen; indices are those of the entries.
            on_fitted: called as signals stop.
        """
        run = _Run(self, shape, on_check, on_fitted)
        size = size or self.stack_size(shape)
        watch = stack.Watch(run.begin, stop, run.look, run.leave)
        if run.is_small:
            while not stop() and (some := feed(size)):
                small.optimise_small(
                    run.points,
                    run.batch(some),
                    self.network.omegas,
                    self.recipe,
                    watch=watch,
                    num_frozen=len(self.frozen.layers),
                    implementation=self.whole_fits or "native",
                    precision=self.precision,
                )
            return

        def next_batch(room: int) -> stack.Batch | None:
            some = feed(room)
            if not some:
                return None
            batch = run.batch(some)
            return replace(batch, parameters=batch.parameters[2 * len(self.frozen.layers) :])

        job = stack.Job(
            self.frozen.of(shape[:-1], run.points),
            shape[:-1],
            self.network.omegas[len(self.frozen.layers) :],
            self.recipe,
            self.implementation,
            self.precision,
            len(self.frozen.layers),
        )
        stack.run(job, size, next_batch, watch)

    def start(self, entries: Sequence[Entry], points: Tensor, values: Tensor) -> BatchedSiren:
        """Networks at step 0."""
        trained = isinstance(self.init, Encoder) and self.network.num_shared_layers == self.network.num_layers - 1
        replaced = self.recipe.start == "mean" or (self.recipe.start == "least_squares" and trained)
        if self.shared or replaced:  # one draw for all, which may be of nothing that stays
            seeds = [signal_seed(self.recipe.seed, "0")] * len(entries)
        else:
            seeds = [signal_seed(self.recipe.seed, entry.fingerprint) for entry in entries]
        scale = resolve_scale(self.recipe.weight_scale, entries[0].signal.shape)
        networks = initial_stack(self.init, points.shape[1], values.shape[2], seeds, scale).to(self.device)
        if self.recipe.start == "least_squares":
            least_squares_start(networks, points, values, self.recipe.ridge, len(set(seeds)) == 1)
        elif self.recipe.start == "mean" and isinstance(self.init, Encoder):
            mean_start(networks, self.init)
        return networks


class _Run:
    """Signals of one shape while they are fitted."""

    def __init__(
        self,
        fitter: Fitter,
        shape: Sequence[int],
        on_check: Callable[[Progress], None],
        on_fitted: Callable[[Fitted], None],
    ) -> None:
        self.fitter, self.on_check, self.on_fitted = fitter, on_check, on_fitted
        self.is_small = fitter.is_small(shape)
        self.begin = time.perf_counter()
        self.points = grid(shape[:-1]).to(fitter.device)
        self.running: dict[int, tuple[Entry, Tensor]] = {}  # by index: with its samples
        layers = [f"layers.{i}" for i in range(fitter.network.num_layers - 1)]
        names = [f"{layer}.{kind}" for layer in (*layers, "head") for kind in ("weight", "bias")]
        frozen = [p.detach().to(fitter.device) for layer in fitter.frozen.layers for p in layer.parameters()]
        self.still = dict(zip(names, frozen, strict=False))  # parameters that no step changes, the same for all
        self.trained = names[len(frozen) :]

    def batch(self, entries: list[Entry]) -> stack.Batch:
        """Networks at step 0, frozen layers included."""
        began = time.perf_counter() - self.begin
        values = torch.stack([e.signal.samples() for e in entries]).to(self.fitter.device)
        self.running |= {e.index: (e, value) for e, value in zip(entries, values, strict=True)}
        with self._threads():
            networks = self.fitter.start(entries, self.points, values)
        return stack.Batch([Record(e.index, began) for e in entries], values, list(networks.parameters()))

    def _threads(self) -> AbstractContextManager[None]:
        return engine.one_thread() if self.is_small else nullcontext()

    def _weights(self, parameters: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole networks, stacked, from what was trained of them."""
        number = len(parameters[0])
        still = {name: p.expand(number, *p.shape) for name, p in self.still.items()}
        return still | {name: p.detach() for name, p in zip(self.trained, parameters, strict=True)}

    def look(self, seen: Look) -> None:
        """Show progress."""
        at = {record.index: row for row, record in enumerate(seen.records)}

        def module(index: int) -> Siren:
            row = {name: w[at[index]] for name, w in self._weights(seen.parameters()).items()}
            return siren_from_rows(row, self.fitter.network.omegas)

        self.on_check(seen.progress(self.fitter.recipe.steps, module))

    def leave(self, records: list[Record], parameters: list[Tensor]) -> None:
        """Measure networks that have stopped and hand them out."""
        weights = self._weights(parameters)
        entries, samples = zip(*(self.running.pop(record.index) for record in records), strict=True)
        with self._threads():
            psnr = measure_psnr(weights, self.fitter.network.omegas, self.points, torch.stack(samples))
        known = [
            FittedSignal(
                entry.signal.name,
                entry.signal.shape,
                entry.signal.channels,
                entry.signal.value_range,
                entry.fingerprint,
                decibels,
                record.steps,
                record.seconds,
                record.reason,
            )
            for entry, record, decibels in zip(entries, records, psnr, strict=True)
        ]
        kept = {name: w.to("cpu", copy=True).contiguous() for name, w in weights.items()}
        self.on_fitted(Fitted([record.index for record in records], known, records, kept))


def _resolve_init(init: Encoder | str | Path, architecture: Architecture | None) -> Encoder | Architecture:
    if isinstance(init, str) and init in RANDOM:
        return architecture or Architecture()
    if isinstance(init, str | Path):
        init = Encoder.load(init)
    if not isinstance(init, Encoder):
        raise bad_type("init", "an Encoder, the path of one, 'siren' or 'shared'", init, "See strainer_fast.pretrain.")
    if next(init.parameters()).dtype != torch.float32:
        init = copy.deepcopy(init).float()  # what fits compute in
    if architecture is not None and architecture != init.architecture:
        raise bad_input("architecture", "none: the encoder brings its own", architecture, "Leave it out.")
    return init

"""Fitting: one network per signal, started from an encoder or from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strainer_fast._checks import InputError, bad_input
from strainer_fast.fitting import engine
from strainer_fast.fitting.fitter import Entry, Fitted, Fitter
from strainer_fast.fitting.interrupt import Interrupted, deferred_interrupt
from strainer_fast.fitting.presets import recipe as get_recipe
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.record import INTERRUPTED, Curve, Progress
from strainer_fast.fitting.result import FitResult, FittedSignal
from strainer_fast.models import Architecture, Encoder
from strainer_fast.signals import Signal, as_signals
from strainer_fast.signals.load import Source

_DISCARD = "Choose another output, or discard the earlier one (--overwrite)."


@dataclass(frozen=True)
class _Row:
    """A finished signal: what is known, its curve and its parameters by name."""

    signal: FittedSignal
    curve: Curve
    weights: dict[str, Tensor]


@engine.neutral()
def fit(
    signals: Source | Iterable[Source],
    init: Encoder | str | Path = "siren",
    recipe: str | Recipe = "fast",
    *,
    target_psnr: float | None = None,
    architecture: Architecture | None = None,
    done: FitResult | None = None,
    implementation: str = "auto",
    device: str = "auto",
    on_check: Callable[[Progress], None] = lambda progress: None,
    on_result: Callable[[FitResult], None] | None = None,
) -> FitResult:
    """Fit one network to each signal.

    Args:
        signals: anything `strainer_fast.signals.load` reads. Sizes and channels may differ.
        init: an Encoder (or the path of a saved one): its sine layers are copied into each network and what follows
            starts as `recipe.start` says; "siren": random networks, each signal its own; or "shared": one random
            network for all, as learning on weights needs it.
        recipe: a preset's name or a Recipe; `steps` is the most a signal gets.
        target_psnr: stop a signal at this many dB; overrides the recipe's.
        architecture: sizes of the networks without an encoder; the paper's by default.
        done: an earlier result of the same settings: its signals are taken over, except interrupted ones.
        implementation, device: see `strainer_fast.explain`.
        on_check: called with the Progress (indices are those of `signals`) every `check_every` steps, or
            several times a second where whole fits of small networks run on the native engine.
        on_result: called with all that is finished whenever more signals have stopped.

    Returns:
        A FitResult with a row per signal, in the order given.

    Raises:
        InputError: unusable signals, an encoder of another input dimension, a start the encoder cannot give, too little
            memory; before anything starts.
        Interrupted: on Ctrl-C; its `result` has the finished signals and the running ones as they were.
    """
    signals = as_signals(signals)
    recipe = get_recipe(recipe) if target_psnr is None else get_recipe(recipe, target_psnr=target_psnr)
    fitter = Fitter(init, recipe, architecture, implementation, device)
    in_features = _check_dimensions(signals)
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, signal in enumerate(signals):
        groups.setdefault(tuple(signal.values.shape), []).append(i)
    for indices in groups.values():
        fitter.check(signals[indices[0]])
    surroundings = fitter.environment(list(groups))
    hashes = engine.fingerprints(signals)
    finished = _take_over(done, signals, hashes, fitter.settings)

    def result() -> FitResult:
        order = sorted(finished)
        return FitResult(
            tuple(finished[i].signal for i in order),
            fitter.network,
            in_features,
            _stack_weights([finished[i].weights for i in order]),
            tuple(finished[i].curve for i in order),
            fitter.settings | {"environment": surroundings},
        )

    def keep(fitted: Fitted) -> None:
        for row, index in enumerate(fitted.indices):
            own = {name: w[row] for name, w in fitted.weights.items()}
            finished[index] = _Row(fitted.signals[row], fitted.records[row].curve(), own)
        # Stacking all that is finished is work, so only for somebody who asked.
        if on_result is not None and not interrupted():
            on_result(result())

    with deferred_interrupt() as interrupted:
        for shape, indices in groups.items():
            waiting = [Entry(i, signals[i], hashes[i]) for i in indices if i not in finished]
            fitter.run(shape, partial(_take, waiting), stop=interrupted, on_check=on_check, on_fitted=keep)
            if interrupted():
                complete = sum(f.signal.stop_reason != INTERRUPTED for f in finished.values())
                message = f"fit interrupted: {complete} of {len(signals)} signals finished"
                raise Interrupted(message, result() if finished else None)
    return result()


def _take(waiting: list[Entry], number: int) -> list[Entry]:
    """The next entries, which wait no longer."""
    taken = waiting[:number]
    del waiting[:number]
    return taken


def _check_dimensions(signals: Sequence[Signal]) -> int:
    dims = {len(s.shape) for s in signals}
    if len(dims) > 1:
        raise bad_input("signals", "one input dimension for all", sorted(dims), "Fit images and volumes apart.")
    return dims.pop()


def _take_over(
    done: FitResult | None, signals: Sequence[Signal], hashes: Sequence[str], settings: dict[str, Any]
) -> dict[int, _Row]:
    """Rows of an earlier run that need no second fit; its settings must be these."""
    if done is None:
        return {}
    then = {name: value for name, value in done.settings.items() if name != "environment"}
    engine.check_same_settings("earlier result", then, settings, _DISCARD)
    wanted = {(s.name, h): i for i, (s, h) in enumerate(zip(signals, hashes, strict=True))}
    taken: dict[int, _Row] = {}
    for row, signal in enumerate(done.signals):
        index = wanted.get((signal.name, signal.fingerprint))
        if index is None:
            raise InputError(
                f"earlier result: {signal.name} is not among the signals, or has changed since. {_DISCARD}"
            )
        if signal.stop_reason != INTERRUPTED:
            taken[index] = _Row(signal, done.curves[row], dict(done.module(row).state_dict()))
    return taken


def _stack_weights(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack networks row by row, heads padded with zeros to the most channels."""
    channels = max(row["head.bias"].shape[0] for row in rows)

    def padded(name: str, tensor: Tensor) -> Tensor:
        if not name.startswith("head.") or tensor.shape[0] == channels:
            return tensor
        full = tensor.new_zeros(channels, *tensor.shape[1:])
        full[: tensor.shape[0]] = tensor
        return full

    return {name: torch.stack([padded(name, row[name]) for row in rows]) for name in rows[0]}

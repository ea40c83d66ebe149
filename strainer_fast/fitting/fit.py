"""Fitting: one network per signal, started from an encoder or from scratch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strainer_fast._checks import InputError, bad_input, bad_type
from strainer_fast.fitting import engine, loop, small
from strainer_fast.fitting.freeze import FrozenFeatures, depth_of
from strainer_fast.fitting.interrupt import Interrupted, deferred_interrupt
from strainer_fast.fitting.loop import Curve, Progress
from strainer_fast.fitting.presets import recipe as get_recipe
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.result import FitResult, FittedSignal, measure_psnr
from strainer_fast.fitting.start import (
    check_start,
    initial_stack,
    least_squares_start,
    mean_start,
    resolve_scale,
    signal_seed,
)
from strainer_fast.models import Architecture, Encoder, Siren
from strainer_fast.models.siren import siren_from_rows
from strainer_fast.ops import choose, choose_device
from strainer_fast.ops.dispatch import resolve_precision
from strainer_fast.signals import Signal, as_signals
from strainer_fast.signals.load import Source

STACK_ELEMENTS = 2**21
"""Most activations (points x width x signals) of one layer in a stack: wide networks run one by one and finish early,
small ones share their calls, 83 of width 32 on 28x28 points."""

GPU_STACK_ELEMENTS = 2**23
"""The same on a GPU, which one image of 178x178 and a network 256 wide keep busy."""


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
            starts as `recipe.start` says; or "siren": random networks.
        recipe: a preset's name or a Recipe; `steps` is the most a signal gets.
        target_psnr: stop a signal at this many dB; overrides the recipe's.
        architecture: sizes of the networks when `init` is "siren"; the paper's by default.
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
    where = choose_device(device)
    chosen = choose(implementation, where).name
    precision = resolve_precision(recipe.precision, chosen, where, can_skip=recipe.optimiser == "adam")
    start_from = _resolve_init(init, architecture)
    network = start_from.architecture if isinstance(start_from, Encoder) else start_from
    in_features = _check_dimensions(signals, start_from)
    check_start(recipe.start, start_from, [s.channels for s in signals])
    depth = depth_of(recipe.freeze, start_from)
    frozen = FrozenFeatures(start_from if isinstance(start_from, Encoder) else None, depth)
    small_too = choose(implementation, where, whole_fits=True).name == "native"
    elements = STACK_ELEMENTS if where.type == "cpu" else GPU_STACK_ELEMENTS
    if recipe.sampling != "full":
        elements = 0  # which points, and how many, follows one signal's progress
    stacks = _stacks(signals, network, recipe, small_too, elements)
    for stack, _ in stacks:
        engine.check_memory(chosen, signals[stack[0]], len(stack), False, network, where, depth)
    settings = {
        "recipe": recipe.as_dict(),
        "init": f"encoder {start_from.fingerprint()}" if isinstance(start_from, Encoder) else "siren",
        "architecture": network.as_dict(),
    }
    surroundings = engine.environment(chosen, where, any(is_small for _, is_small in stacks), precision)
    hashes = engine.fingerprints(signals)
    finished = _take_over(done, signals, hashes, settings)

    def result() -> FitResult:
        order = sorted(finished)
        return FitResult(
            tuple(finished[i].signal for i in order),
            network,
            in_features,
            _stack_weights([finished[i].weights for i in order]),
            tuple(finished[i].curve for i in order),
            settings | {"environment": surroundings},
        )

    with deferred_interrupt() as interrupted:
        for stack, is_small in stacks:
            todo = [i for i in stack if i not in finished]
            if not todo:
                continue

            def look(
                seen: loop.Look, network_of: Callable[[Sequence[Tensor], int], Siren], todo: list[int] = todo
            ) -> None:
                now = [todo[row] for row in seen.running]
                module = partial(_module, now, seen.parameters, network_of)
                on_check(seen.progress(recipe.steps, now, module))

            def keep(rows: dict[int, _Row], todo: list[int] = todo) -> None:
                finished.update({todo[row]: kept for row, kept in rows.items()})
                # Stacking all that is finished is work, so only for somebody who asked.
                if on_result is not None and not interrupted():
                    on_result(result())

            _fit_stack(
                [signals[i] for i in todo],
                [hashes[i] for i in todo],
                start_from,
                recipe,
                chosen,
                precision,
                is_small,
                frozen,
                where,
                interrupted,
                look,
                keep,
            )
            if interrupted():
                complete = sum(row.signal.stop_reason != loop.INTERRUPTED for row in finished.values())
                raise Interrupted(f"fit interrupted: {complete} of {len(signals)} signals finished", result())
    return result()


def _fit_stack(
    signals: Sequence[Signal],
    hashes: Sequence[str],
    init: Encoder | Architecture,
    recipe: Recipe,
    implementation: str,
    precision: str,
    is_small: bool,
    frozen: FrozenFeatures,
    device: torch.device,
    stop: Callable[[], bool],
    look: Callable[[loop.Look, Callable[[Sequence[Tensor], int], Siren]], None],
    keep: Callable[[dict[int, _Row]], None],
) -> None:
    """Fit signals of one shape and channels together, each on its own network; `keep` gets each as it stops."""
    begin = time.perf_counter()
    points = signals[0].points().to(device)
    values = torch.stack([s.samples() for s in signals]).to(device)
    seeds = [signal_seed(recipe.seed, fingerprint) for fingerprint in hashes]
    scale = resolve_scale(recipe.weight_scale, signals[0].shape)
    stack = initial_stack(init, points.shape[1], values.shape[2], seeds, scale).to(device)
    if recipe.start == "least_squares":
        least_squares_start(stack, points, values, recipe.ridge)
    elif recipe.start == "mean" and isinstance(init, Encoder):
        mean_start(stack, init)
    names, parameters = map(list, zip(*stack.named_parameters(), strict=True))
    still = 2 * len(frozen.layers)  # parameters that no step changes, the same for all
    rest = {name: p.detach()[0] for name, p in zip(names[:still], parameters[:still], strict=True)}

    def network_of(trained: Sequence[Tensor], row: int) -> Siren:
        own = {name: p.detach()[row] for name, p in zip(names[still:], trained, strict=True)}
        return siren_from_rows(rest | own, stack.omegas)

    def leave(stopped: list[int], trained: list[Tensor], trace: loop.Trace) -> None:
        rows = {}
        for i in stopped:
            network = network_of(trained, i)
            known = FittedSignal(
                signals[i].name,
                signals[i].shape,
                signals[i].channels,
                signals[i].value_range,
                hashes[i],
                measure_psnr(network, points, values[i]),
                trace.steps[i],
                trace.seconds[i],
                trace.reasons[i],
            )
            rows[i] = _Row(known, trace.curve(i), {n: p.cpu() for n, p in network.state_dict().items()})
        keep(rows)

    if is_small:
        small.optimise_small(
            points,
            values,
            parameters,
            stack.omegas,
            recipe,
            num_frozen=len(frozen.layers),
            begin=begin,
            stop=stop,
            on_check=lambda seen: look(seen, network_of),
            on_leave=leave,
        )
        return
    loop.optimise(
        frozen.of(signals[0].shape, points),
        values,
        parameters[still:],
        stack.omegas[len(frozen.layers) :],
        recipe,
        implementation=implementation,
        precision=precision,
        steps=recipe.steps,
        independent=True,
        target_psnr=recipe.target_psnr,
        shape=signals[0].shape,
        num_frozen=len(frozen.layers),
        begin=begin,
        stop=stop,
        on_check=lambda seen: look(seen, network_of),
        on_leave=leave,
    )


def _module(
    now: list[int], parameters: Sequence[Tensor], network_of: Callable[[Sequence[Tensor], int], Siren], index: int
) -> Siren:
    return network_of(parameters, now.index(index))


def _resolve_init(init: Encoder | str | Path, architecture: Architecture | None) -> Encoder | Architecture:
    if init == "siren":
        return architecture or Architecture()
    if isinstance(init, str | Path):
        init = Encoder.load(init)
    if not isinstance(init, Encoder):
        raise bad_type("init", "an Encoder, the path of one, or 'siren'", init, "See strainer_fast.pretrain.")
    if next(init.parameters()).dtype != torch.float32:
        init = copy.deepcopy(init).float()  # what fits compute in
    if architecture is not None and architecture != init.architecture:
        raise bad_input("architecture", "none: the encoder brings its own", architecture, "Leave it out.")
    return init


def _check_dimensions(signals: Sequence[Signal], init: Encoder | Architecture) -> int:
    dims = {len(s.shape) for s in signals}
    if len(dims) > 1:
        raise bad_input("signals", "one input dimension for all", sorted(dims), "Fit images and volumes apart.")
    in_features = dims.pop()
    if isinstance(init, Encoder) and init.in_features != in_features:
        raise bad_input(
            "signals",
            f"{init.in_features} coordinates per point, as the encoder has",
            in_features,
            "Use another encoder.",
        )
    return in_features


def _stacks(
    signals: Sequence[Signal], network: Architecture, recipe: Recipe, small_too: bool, elements: int
) -> list[tuple[list[int], bool]]:
    """(indices of signals that run together, whether by `ops.fit_small`): same shape and channels, a bounded size."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, signal in enumerate(signals):
        groups.setdefault(tuple(signal.values.shape), []).append(i)
    stacks = []
    for indices in groups.values():
        first = signals[indices[0]]
        points = first.samples().shape[0]
        is_small = small_too and (small.ruled_out(recipe, network, len(first.shape), first.channels, points) is None)
        size = max(1, elements // (points * network.hidden_features))
        if is_small:
            size = max(size, small.NETWORKS_PER_THREAD * torch.get_num_threads())
        stacks += [(indices[i : i + size], is_small) for i in range(0, len(indices), size)]
    return stacks


def _take_over(
    done: FitResult | None, signals: Sequence[Signal], hashes: Sequence[str], settings: dict[str, Any]
) -> dict[int, _Row]:
    """Rows of an earlier run that need no second fit; its settings must be these."""
    if done is None:
        return {}
    then = {name: value for name, value in done.settings.items() if name != "environment"}
    engine.check_same_settings("earlier result", then, settings, _DISCARD)
    wanted = {(s.name, h): i for i, (s, h) in enumerate(zip(signals, hashes, strict=True))}
    taken = {}
    for row, signal in enumerate(done.signals):
        index = wanted.get((signal.name, signal.fingerprint))
        if index is None:
            raise InputError(
                f"earlier result: {signal.name} is not among the signals, or has changed since. {_DISCARD}"
            )
        if signal.stop_reason != loop.INTERRUPTED:
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

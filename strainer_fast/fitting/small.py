"""The loop around `ops.fit_small`: whole fits of small networks, on cores or on a GPU, with looks from outside."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.record import BUDGET, DIVERGED, INTERRUPTED, NON_FINITE, TARGET, Look, Record
from strainer_fast.fitting.schedule import factor
from strainer_fast.fitting.stack import Batch, Watch
from strainer_fast.models import Architecture
from strainer_fast.ops import fit_small as engine

UNDERSTOOD = frozenset(
    {
        *("name", "steps", "pretrain_steps", "start", "ridge", "learning_rate", "betas", "eps"),
        *("target_psnr", "guard_db", "check_every", "seed"),
        *("weight_scale", "freeze", "schedule", "warmup_steps"),
        *("momentum", "damping", "refresh_every", "batch_points"),  # of optimisers and samplings that rule them out
        *("inner_steps", "inner_learning_rate", "meta_batch", "pretrain_method"),
        *(f"pretrain_{what}" for what in ("weight_scale", "optimiser", "learning_rate", "schedule", "warmup_steps")),
        "precision",  # checked before; the native engine gets float32 only
    }
)
"""Fields of a recipe that these fits follow (or that others follow before them). Any other one rules them out unless it
has its default value, so that a new field is never ignored."""

NETWORKS_PER_THREAD = 32
"""Networks of a stack, at least: cores wait for the last network only now and then."""

NETWORKS_PER_PROGRAM = 8
"""The same on a GPU, for each of the programs that run there at a time; exactly, so that none waits at the end."""

MAX_STEPS = 100_000

CPU = torch.device("cpu")

LOOK_SECONDS = 0.2
"""How long the engine runs between two looks from outside, about: for progress, Ctrl-C and results."""

REASONS = {
    engine.TARGET: TARGET,
    engine.BUDGET: BUDGET,
    engine.NON_FINITE: NON_FINITE,
    engine.DIVERGED: DIVERGED,
}


def engine_of(implementation: str, device: torch.device) -> str | None:
    """Which of the engines of `fit_small` goes with an implementation; None where fits run step by step.

    Under Triton's interpreter, on the CPU, they do: whole fits there are for tests, by `fit_small` itself.
    """
    if implementation == "triton":
        return "triton" if device.type == "cuda" else None
    return "native" if implementation == "native" else None


def ruled_out(
    recipe: Recipe,
    network: Architecture,
    in_features: int,
    channels: int,
    num_points: int,
    *,
    precision: str = "fp32",
    device: torch.device = CPU,
) -> str | None:
    """What keeps `fit_small` from running such fits: "recipe.FIELD = value" or a size; None where nothing does.

    `device` is that of the fits: on a CPU the native engine's sizes count, on a GPU the Triton kernel's.
    """
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name not in UNDERSTOOD and value != field.default:
            return f"recipe.{field.name} = {value!r}"
    if recipe.schedule == "plateau":
        return "recipe.schedule = 'plateau'"
    if recipe.steps > MAX_STEPS:  # the losses of all steps are kept from the start
        return f"recipe.steps = {recipe.steps}, above {MAX_STEPS}"
    if device.type != "cpu":
        sizes = in_features, network.hidden_features, network.num_layers, channels, num_points
        return engine.unfit(*sizes, precision, device)
    shapes = [*network.layer_shapes(in_features), (channels, network.hidden_features)]
    return engine.too_large(sum(out * (width + 1) for out, width in shapes), num_points)


def optimise_small(
    points: Tensor,  # [P, in]
    batch: Batch,
    omegas: Sequence[float],
    recipe: Recipe,
    *,
    watch: Watch,
    num_frozen: int = 0,
    implementation: str = "native",
    precision: str = "fp32",
) -> None:
    """`stack.run` for a batch of small networks: same results to rounding.

    `points` and the batch's parameters are those of whole networks, `num_frozen` layers included; `watch` gets the
    parameters of the others. `on_check` comes several times a second instead of every `check_every` steps. The host
    waits for a GPU once a look, not once a step. `implementation` and `precision` are those of `ops.fit_small`.
    """
    values, records = batch.values, batch.records
    state = engine.FitState.fresh(batch.parameters, recipe.steps, recipe.guard_db is not None, implementation)
    each = torch.arange(recipe.steps, device="cpu")
    learning_rates = (recipe.learning_rate * factor(recipe, each, torch.zeros_like(each))).float().to(state.device)
    target = None if recipe.target_psnr is None else torch.full_like(state.best_mse, recipe.target_psnr)
    # The first call only measures, so that an outside look sees the start.
    until, stride, warned = 0, 1, False
    running = list(range(len(records)))
    while running:
        called = time.perf_counter()
        engine.fit_small(
            points,
            values,
            state,
            omegas,
            rows=torch.tensor(running, device="cpu"),
            until=until,
            learning_rates=learning_rates,
            betas=recipe.betas,
            eps=recipe.eps,
            check_every=recipe.check_every,
            target_psnr=target,
            guard_db=recipe.guard_db,
            frozen=num_frozen,
            precision=precision,
        )
        spent = time.perf_counter() - called
        interrupted = watch.stop()
        now = time.perf_counter() - watch.begin
        for n in running:
            records[n].clock.append((until, now - records[n].began))
        reasons, measured, skipped, last = state.seen()
        seconds = state.seconds.tolist()
        if not warned and any(skipped):
            warned = True
            _warn_of_overflow(precision, sum(map(bool, skipped)))
        watch.on_check(_look(state, records, running, [last[n] for n in running], until, now, num_frozen))
        leaving = [n for n in running if reasons[n] != engine.RUNNING or interrupted]
        if interrupted and recipe.guard_db is not None:
            best, spike = state.best_mse.tolist(), 10 ** (recipe.guard_db / 10)
            alive = [n for n in running if reasons[n] == engine.RUNNING]
            _back_to_best(state, [n for n in alive if not last[n] <= spike * best[n]])
        if leaving:
            index = torch.tensor(leaving, device=state.device)
            for n, curve in zip(leaving, state.mse[index].cpu(), strict=True):
                records[n].mse = curve[: max(measured[n], 1)].tolist()
                stopped = called - watch.begin + seconds[n] - records[n].began
                records[n].stop(REASONS.get(reasons[n], INTERRUPTED), stopped)
            watch.on_leave([records[n] for n in leaving], [p[index] for p in state.parameters[2 * num_frozen :]])
        running = [n for n in running if reasons[n] == engine.RUNNING and not interrupted]
        if until > 0:
            stride = max(1, min(2 * stride, math.ceil(stride * LOOK_SECONDS / max(spent, 1e-6))))
        until = min(recipe.steps, until + stride)


def _back_to_best(state: engine.FitState, spiking: Sequence[int]) -> None:
    """What the guard's next look would have done: a network that is spiking keeps its best weights."""
    for n in spiking:
        for p, best in zip(state.parameters, state.best, strict=True):
            p[n] = best[n]


def _warn_of_overflow(precision: str, number: int) -> None:
    how = "They will not move until that changes: lower the learning rate."
    if precision == "fp16":
        how = "They continue with a smaller loss scale; if this comes again, use precision='tf32' or 'fp32'."
    warnings.warn(f"gradients overflowed in {precision} and {number} networks skipped steps. {how}", stacklevel=3)


def _look(
    state: engine.FitState,
    records: Sequence[Record],
    running: list[int],
    mse: Sequence[float],
    step: int,
    now: float,
    num_frozen: int,
) -> Look:
    with np.errstate(divide="ignore", invalid="ignore"):
        psnr = -10 * np.log10(np.array(mse))

    def trained() -> list[Tensor]:
        index = torch.tensor(running, device=state.device)
        return [p[index] for p in state.parameters[2 * num_frozen :]]

    return Look([records[n] for n in running], [step] * len(running), psnr.tolist(), now, trained)

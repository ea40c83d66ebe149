"""The loop around `ops.fit_small`: whole fits of small networks on the native engine, with looks from outside."""

from __future__ import annotations

import math
import time
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
        "precision",  # checked before: only float32 gets here
    }
)
"""Fields of a recipe that these fits follow (or that others follow before them). Any other one rules them out unless it
has its default value, so that a new field is never ignored."""

NETWORKS_PER_THREAD = 32
"""Networks of a stack, at least: cores wait for the last network only now and then."""

MAX_STEPS = 100_000

LOOK_SECONDS = 0.2
"""How long the engine runs between two looks from outside, about: for progress, Ctrl-C and results."""

REASONS = {
    engine.TARGET: TARGET,
    engine.BUDGET: BUDGET,
    engine.NON_FINITE: NON_FINITE,
    engine.DIVERGED: DIVERGED,
}


def ruled_out(recipe: Recipe, network: Architecture, in_features: int, channels: int, num_points: int) -> str | None:
    """What keeps `fit_small` from running such fits: "recipe.FIELD = value" or a size; None where nothing does."""
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.name not in UNDERSTOOD and value != field.default:
            return f"recipe.{field.name} = {value!r}"
    if recipe.schedule == "plateau":
        return "recipe.schedule = 'plateau'"
    if recipe.steps > MAX_STEPS:  # the losses of all steps are kept from the start
        return f"recipe.steps = {recipe.steps}, above {MAX_STEPS}"
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
) -> None:
    """`stack.run` for a batch of small networks: same results to rounding.

    `points` and the batch's parameters are those of whole networks, `num_frozen` layers included; `watch` gets the
    parameters of the others. `on_check` comes several times a second instead of every `check_every` steps.
    """
    values, records = batch.values, batch.records
    state = engine.FitState.fresh(batch.parameters, recipe.steps, recipe.guard_db is not None)
    each = torch.arange(recipe.steps, device="cpu")
    learning_rates = (recipe.learning_rate * factor(recipe, each, torch.zeros_like(each))).float()
    target = None if recipe.target_psnr is None else torch.full_like(state.best_mse, recipe.target_psnr)
    # The first call only measures, so that an outside look sees the start.
    until, stride = 0, 1
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
        )
        spent = time.perf_counter() - called
        interrupted = watch.stop()
        now = time.perf_counter() - watch.begin
        for n in running:
            records[n].clock.append((until, now - records[n].began))
        watch.on_check(_look(state, records, running, until, now, num_frozen))
        reasons, seconds, measured = state.reason.tolist(), state.seconds.tolist(), state.measured.tolist()
        leaving = [n for n in running if reasons[n] != engine.RUNNING or interrupted]
        if interrupted and recipe.guard_db is not None:
            _back_to_best(state, [n for n in running if reasons[n] == engine.RUNNING], recipe.guard_db)
        for n in leaving:
            records[n].mse = state.mse[n, : max(measured[n], 1)].tolist()
            records[n].stop(REASONS.get(reasons[n], INTERRUPTED), called - watch.begin + seconds[n] - records[n].began)
        if leaving:
            index = torch.tensor(leaving, device="cpu")
            watch.on_leave([records[n] for n in leaving], [p[index] for p in state.parameters[2 * num_frozen :]])
        running = [n for n in running if reasons[n] == engine.RUNNING and not interrupted]
        if until > 0:
            stride = max(1, min(2 * stride, math.ceil(stride * LOOK_SECONDS / max(spent, 1e-6))))
        until = min(recipe.steps, until + stride)


def _back_to_best(state: engine.FitState, rows: Sequence[int], guard_db: float) -> None:
    """What the guard's next look would have done: a network that is spiking keeps its best weights."""
    spike = 10 ** (guard_db / 10)
    for n in rows:
        mse = float(state.mse[n, int(state.measured[n]) - 1])
        if not mse <= spike * float(state.best_mse[n]):
            for p, best in zip(state.parameters, state.best, strict=True):
                p[n] = best[n]


def _look(
    state: engine.FitState, records: Sequence[Record], running: list[int], step: int, now: float, num_frozen: int
) -> Look:
    last = (state.measured - 1).clamp_min(0)
    mse = state.mse.gather(1, last[:, None])[running, 0].double().numpy()
    with np.errstate(divide="ignore", invalid="ignore"):
        psnr = -10 * np.log10(mse)
    index = torch.tensor(running, device="cpu")

    def trained() -> list[Tensor]:
        return [p[index] for p in state.parameters[2 * num_frozen :]]

    return Look([records[n] for n in running], [step] * len(running), psnr.tolist(), now, trained)

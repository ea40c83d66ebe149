"""Whole fits of small networks inside a core's caches: k optimiser steps of one network at a time, one per core.

A small network's step is shorter than the Python and PyTorch calls around it. Here the native engine keeps parameters,
optimiser state and activations of one network in a core's first two caches for k steps and takes the next network from
a queue. A network runs on one core with a tile of fixed size, so its bits depend neither on the order of the queue nor
on the number of threads. The contract, which other devices may implement: docs/native.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strainer_fast._checks import bad_input, check_count
from strainer_fast.kernels import cpu

CACHE_BYTES = 2**20
"""Most memory of one network, its gradients and optimiser state: a second-level cache of today's CPUs."""

STEP_FLOPS = 2e8
"""Most work of one step. Above a millisecond or two the calls around a step do not count any more, and all cores can
share its points."""

RUNNING, TARGET, BUDGET, NON_FINITE, DIVERGED = range(5)
"""Values of FitState.reason."""


@dataclass
class FitState:
    """All that a fit of N stacked networks carries from call to call; updated in place."""

    parameters: list[Tensor]  # [N, out, in], [N, out] of each layer
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    best: list[Tensor]  # parameters at the best check so far; empty without a guard
    step: Tensor  # [N] int64
    adam_step: Tensor  # [N] int64, since the optimiser's state was zero
    scale: Tensor  # [N], of the learning rate
    best_mse: Tensor  # [N] float64
    rollbacks: Tensor  # [N] int64
    mse: Tensor  # [N, budget + 1], before step t
    measured: Tensor  # [N] int64, entries of mse that belong to the fit
    reason: Tensor  # [N] int64
    seconds: Tensor  # [N] float64, from the start of the last call that ran it to its stop

    @classmethod
    def fresh(cls, parameters: Sequence[Tensor], budget: int, guard: bool) -> FitState:
        """The state at step 0; parameters are copied."""
        num = parameters[0].shape[0]

        def copies() -> list[Tensor]:
            return [p.detach().to("cpu", torch.float32, copy=True).contiguous() for p in parameters]

        def each(dtype: torch.dtype, fill: float = 0) -> Tensor:
            # Neither dtype nor device by default: callers change what these are.
            return torch.full((num,), fill, dtype=dtype, device="cpu")

        return cls(
            copies(),
            [torch.zeros_like(p) for p in copies()],
            [torch.zeros_like(p) for p in copies()],
            copies() if guard else [],
            each(torch.int64),
            each(torch.int64),
            each(torch.float32, 1),
            each(torch.float64, math.inf),
            each(torch.int64),
            torch.zeros(num, budget + 1, dtype=torch.float32, device="cpu"),
            each(torch.int64),
            each(torch.int64),
            each(torch.float64),
        )


def too_large(parameters: int, points: int) -> str | None:
    """Why networks of so many parameters on so many points are not for `fit_small`; None where they are."""
    # The weights twice packed, value, two moments, gradient, last value.
    bytes_needed = 7 * 4 * parameters
    if bytes_needed > CACHE_BYTES:
        return f"{parameters} parameters need {bytes_needed // 1024} KiB, above {CACHE_BYTES // 1024}"
    flops = 6.0 * parameters * points
    if flops > STEP_FLOPS:
        return f"a step of {flops / 1e6:.0f} MFLOP is above {STEP_FLOPS / 1e6:.0f}"
    return None


def fit_small(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    state: FitState,
    omegas: Sequence[float],  # L - 1
    *,
    until: int,
    learning_rates: Tensor,  # [budget]
    betas: tuple[float, float],
    eps: float,
    check_every: int,
    rows: Tensor | None = None,  # int64: the queue
    target_psnr: Tensor | None = None,  # [N], dB
    guard_db: float | None = None,
    frozen: int = 0,
) -> None:
    """Run networks until they stop or have done `until` steps, in place on `state`.

    Args:
        until: steps after which a network that has not stopped is left, to be continued by another call.
        learning_rates: by step; their number is the budget at which a network stops.
        rows: which networks, in what order; all that have not stopped by default.
        target_psnr: a network stops at the first check (every `check_every` steps, and at the end) at or above it.
        guard_db: a non-finite loss, or a PSNR at a check this far below the best one so far, puts the best weights back
            with a fresh optimiser and half the learning rate, once; the second time it stops the network there. None:
            a non-finite loss stops it at its last finite weights.
        frozen: the first layers that keep their weights; no gradient is computed for them.

    Raises InputError for shapes, numbers or rows that do not belong together.
    """
    if rows is None:
        rows = (state.reason == RUNNING).nonzero().flatten()
    _check(points, values, state, omegas, rows, until, learning_rates, check_every, target_psnr, guard_db, frozen)
    target = torch.full_like(state.best_mse, -1.0)
    if target_psnr is not None:
        target = (10 ** (-target_psnr.double() / 10)).contiguous()
    cpu.fit(
        points.detach().float().contiguous(),
        values.detach().float().contiguous(),
        state.parameters,
        state.exp_avg,
        state.exp_avg_sq,
        state.best or None,
        [*omegas, 1.0],
        rows=rows.contiguous(),
        until=until,
        budget=learning_rates.numel(),
        learning_rates=learning_rates.float().contiguous(),
        betas=betas,
        eps=eps,
        target_mse=target,
        check_every=check_every,
        guard=0.0 if guard_db is None else 10 ** (guard_db / 10),
        frozen=frozen,
        step=state.step,
        adam_step=state.adam_step,
        scale=state.scale,
        best_mse=state.best_mse,
        rollbacks=state.rollbacks,
        mse=state.mse,
        measured=state.measured,
        reason=state.reason,
        seconds=state.seconds,
        threads=torch.get_num_threads(),
    )


def _check(
    points: Tensor,
    values: Tensor,
    state: FitState,
    omegas: Sequence[float],
    rows: Tensor,
    until: int,
    learning_rates: Tensor,
    check_every: int,
    target_psnr: Tensor | None,
    guard_db: float | None,
    frozen: int,
) -> None:
    """Everything that the library takes on trust."""
    num, layers, budget = len(state.step), len(state.parameters) // 2, learning_rates.numel()
    heads = state.parameters[-1].shape[-1]
    if points.ndim != 2 or values.shape != (num, points.shape[0], heads) or heads == 0:
        got = f"points {list(points.shape)}, values {list(values.shape)}"
        raise bad_input("points and values", f"[P, in] and [{num}, P, {heads}]", got, "One signal per network.")
    inputs = points.shape[1]
    for weight, bias in zip(state.parameters[::2], state.parameters[1::2], strict=True):
        if weight.ndim != 3 or weight.shape[::2] != (num, inputs) or bias.shape != weight.shape[:2]:
            got = f"{list(weight.shape)} and {list(bias.shape)}"
            raise bad_input("parameters", f"[{num}, out, {inputs}] and [{num}, out]", got, "Stack the networks.")
        inputs = weight.shape[1]
    stacks = [state.exp_avg, state.exp_avg_sq, *([state.best] if state.best else [])]
    if any(a.shape != b.shape for stack in stacks for a, b in zip(stack, state.parameters, strict=True)):
        raise bad_input("state", "optimiser state shaped as the parameters", "other shapes", "Use FitState.fresh.")
    tensors = [t for stack in (state.parameters, *stacks) for t in stack] + [state.mse, state.scale]
    if any(t.dtype != torch.float32 or t.device.type != "cpu" or not t.is_contiguous() for t in tensors):
        raise bad_input("state", "contiguous float32 tensors on the CPU", "others", "Use FitState.fresh.")
    if state.mse.shape != (num, budget + 1):
        got = f"a state for {state.mse.shape[1] - 1} steps"
        raise bad_input("learning_rates", f"one per step of the state, {budget} in all", got, "Use one budget.")
    if len(omegas) != layers - 1:
        raise bad_input("omegas", f"one per sine layer, {layers - 1} in all", len(omegas), "Give each layer its own.")
    if rows.dtype != torch.int64 or rows.ndim != 1 or rows.device.type != "cpu" or len(set(rows.tolist())) != len(rows):
        raise bad_input("rows", "different indices, int64 on the CPU", rows, "Give every network once.")
    if any(not 0 <= row < num for row in rows.tolist()):
        raise bad_input("rows", f"indices below {num}", rows, "Networks count from 0.")
    if guard_db is not None and not state.best:
        raise bad_input("guard_db", "a state with a guard", "one without", "Use FitState.fresh(..., guard=True).")
    if target_psnr is not None and target_psnr.shape != (num,):
        raise bad_input("target_psnr", f"shape [{num}]", list(target_psnr.shape), "One target per network.")
    check_count("until", until, 0, budget)
    check_count("check_every", check_every)
    check_count("frozen", frozen, 0, layers)

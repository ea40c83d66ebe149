"""Whole fits of small networks: k optimiser steps of one network at a time, one per core or per program of a GPU.

A small network's step is shorter than the Python and PyTorch calls around it. Here an engine keeps parameters,
optimiser state and activations of one network in the nearest caches for k steps and takes the next network from a
queue: on a CPU the native engine, one network per core; on a GPU a Triton kernel whose programs stay on the chip. A
network runs on one core, or in one program, with a tile of fixed size, so its bits depend neither on the order of the
queue nor on the number of threads or programs. The contract, and where the two differ: docs/native.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strainer_fast._checks import InputError, bad_input, check_choice, check_count
from strainer_fast.kernels import cpu
from strainer_fast.ops.dispatch import check_precision, triton_missing
from strainer_fast.ops.triton import on_device

CACHE_BYTES = 2**20
"""Most memory of one network, its gradients and optimiser state: a second-level cache of today's CPUs."""

STEP_FLOPS = 2e8
"""Most work of one step. Above a millisecond or two the calls around a step do not count any more, and all cores can
share its points."""

GPU_STEP_FLOPS = 1e8
"""The same on a GPU, where one program of hundreds has a network for itself. Modelled: there a step of this much work
takes half a millisecond, and networks that share the chip step by step are no slower."""

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
    seconds: Tensor  # [N] float64 on the CPU, from the start of the last call that ran it to its stop
    loss_scale: Tensor  # [N], lowered where gradients overflowed in fp16
    skipped: Tensor  # [N] int64, steps without an update because gradients overflowed in half precision
    flat: list[Tensor]  # Triton's: [N, length] that parameters, exp_avg, exp_avg_sq and best are views of; else empty

    @classmethod
    def fresh(
        cls, parameters: Sequence[Tensor], budget: int, guard: bool, implementation: str | None = None
    ) -> FitState:
        """The state at step 0; parameters are copied.

        Args:
            implementation: "native", which keeps the state on the CPU, or "triton", on the parameters' device. By
                default the one for that device.

        Raises InputError where Triton cannot run there, or does not have such networks.
        """
        first = parameters[0]
        implementation = implementation or ("triton" if first.is_cuda else "native")
        check_choice("implementation", implementation, ("native", "triton"))
        num, device = first.shape[0], first.device if implementation == "triton" else torch.device("cpu")
        flat: list[Tensor] = []
        if implementation == "triton":
            stacks, flat = _flat_stacks(parameters, 4 if guard else 3)
        else:
            stacks = [
                [p.detach().to("cpu", torch.float32, copy=True).contiguous() for p in parameters]
                for _ in range(4 if guard else 3)
            ]
            for moments in stacks[1:3]:
                for moment in moments:
                    moment.zero_()

        def each(dtype: torch.dtype, fill: float = 0, device: torch.device = device) -> Tensor:
            # Neither dtype nor device by default: callers change what these are.
            return torch.full((num,), fill, dtype=dtype, device=device)

        return cls(
            stacks[0],
            stacks[1],
            stacks[2],
            stacks[3] if guard else [],
            each(torch.int64),
            each(torch.int64),
            each(torch.float32, 1),
            each(torch.float64, math.inf),
            each(torch.int64),
            torch.zeros(num, budget + 1, dtype=torch.float32, device=device),
            each(torch.int64),
            each(torch.int64),
            each(torch.float64, device=torch.device("cpu")),
            each(torch.float32, 1),
            each(torch.int64),
            flat,
        )

    @property
    def device(self) -> torch.device:
        """Of all but `seconds`."""
        return self.step.device

    def seen(self) -> tuple[list[int], list[int], list[int], list[float]]:
        """(reason, measured, skipped, last mse) of each network on the host, in one transfer."""
        last = self.mse.gather(1, (self.measured - 1).clamp_min(0)[:, None])[:, 0]
        # float64 holds them all exactly.
        rows = torch.stack([t.double() for t in (self.reason, self.measured, self.skipped, last)]).cpu()
        reason, measured, skipped = rows[:3].long().tolist()
        return reason, measured, skipped, rows[3].tolist()


def _flat_stacks(parameters: Sequence[Tensor], number: int) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Of the Triton kernel: parameters, zeros, zeros and parameters as views, and what they are views of."""
    first = parameters[0]
    why = triton_missing(first.device)
    if why is not None:
        raise bad_input("parameters", "tensors where the Triton kernels run", why, "Use implementation='native'.")
    from strainer_fast.kernels.small_fits import layout_of

    try:
        layout = layout_of(parameters)
    except ValueError as error:
        raise InputError(str(error)) from None
    flat = [first.new_zeros(first.shape[0], layout.length, dtype=torch.float32) for _ in range(number)]
    stacks = [layout.views(buffer) for buffer in flat]
    for stack in stacks[::3]:
        for view, p in zip(stack, parameters, strict=True):
            view.copy_(p.detach())
    return stacks, flat


def unfit(
    coordinates: int, width: int, num_layers: int, channels: int, points: int, precision: str, device: torch.device
) -> str | None:
    """Why the Triton kernel does not run whole fits of such networks on such signals; None where it does."""
    from strainer_fast.kernels import small_fits

    with on_device(torch.empty(0, device=device)):
        why = small_fits.unfit(coordinates, width, num_layers, channels, precision)
    if why is not None:
        return why
    parameters = small_fits.Layout(coordinates, width, num_layers - 2, channels).parameters
    flops = 6.0 * parameters * points
    return f"a step of {flops / 1e6:.0f} MFLOP is above {GPU_STEP_FLOPS / 1e6:.0f}" if flops > GPU_STEP_FLOPS else None


def too_large(parameters: int, points: int) -> str | None:
    """Why networks of so many parameters on so many points are not for the native engine; None where they are."""
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
    precision: str = "fp32",
) -> None:
    """Run networks until they stop or have done `until` steps, in place on `state`, by the engine that it was made for.

    On a GPU it returns when all have stopped or done so.

    Args:
        until: steps after which a network that has not stopped is left, to be continued by another call.
        learning_rates: by step; their number is the budget at which a network stops.
        rows: which networks, in what order; all that have not stopped by default.
        target_psnr: a network stops at the first check (every `check_every` steps, and at the end) at or above it.
        guard_db: a non-finite loss, or a PSNR at a check this far below the best one so far, puts the best weights back
            with a fresh optimiser and half the learning rate, once; the second time it stops the network there. None:
            a non-finite loss stops it at its last finite weights.
        frozen: the first layers that keep their weights; no gradient is computed for them.
        precision: what operands of products are rounded to, on a GPU.

    Raises InputError for shapes, numbers, rows or devices that do not belong together.
    """
    if rows is None:
        rows = (state.reason == RUNNING).nonzero().flatten().cpu()
    check_precision(precision, "triton" if state.flat else "native")
    _check(points, values, state, omegas, rows, until, learning_rates, check_every, target_psnr, guard_db, frozen)
    target = torch.full_like(state.best_mse, -1.0)
    if target_psnr is not None:
        target = (10 ** (-target_psnr.to(state.device).double() / 10)).contiguous()
    guard = 0.0 if guard_db is None else 10 ** (guard_db / 10)
    if state.flat:
        fixed = omegas, until, learning_rates, betas, eps, check_every, target, guard, frozen, precision
        _run_triton(points, values, state, rows, *fixed)
        return
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
        guard=guard,
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


def _run_triton(
    points: Tensor,
    values: Tensor,
    state: FitState,
    rows: Tensor,
    omegas: Sequence[float],
    until: int,
    learning_rates: Tensor,
    betas: tuple[float, float],
    eps: float,
    check_every: int,
    target: Tensor,
    guard: float,
    frozen: int,
    precision: str,
) -> None:
    from strainer_fast.kernels.segments import DTYPES
    from strainer_fast.kernels.small_fits import (
        Fits,
        launch_small_fits,
        layout_of,
        small_fits_programs,
        small_fits_scratch,
        unfit,
    )

    device, layout = state.device, layout_of(state.parameters)
    with torch.no_grad(), on_device(state.step):
        why = unfit(layout.inputs, layout.width, layout.hidden + 2, layout.channels, precision)
        if why is not None:
            raise bad_input("parameters", "networks that fit a block of this GPU", why, "Fit them step by step.")
        begin, programs = time.perf_counter(), small_fits_programs(len(rows), layout.width, precision)
        gradients, scratch = small_fits_scratch(layout, programs, precision)
        launch_small_fits(
            points.detach().float().contiguous(),
            values.detach().float().contiguous(),
            layout,
            Fits(
                parameters=state.flat[0],
                exp_avg=state.flat[1],
                exp_avg_sq=state.flat[2],
                best=state.flat[3] if state.best else None,
                step=state.step,
                adam_step=state.adam_step,
                scale=state.scale,
                best_mse=state.best_mse,
                rollbacks=state.rollbacks,
                mse=state.mse,
                measured=state.measured,
                reason=state.reason,
                loss_scale=state.loss_scale,
                skipped=state.skipped,
            ),
            torch.tensor([*omegas, 1.0], dtype=torch.float32, device=device),
            rows=rows.to(device),
            queue=torch.zeros(1, dtype=torch.int32, device=device),
            until=until,
            learning_rates=learning_rates.to(device, torch.float32).contiguous(),
            betas=betas,
            eps=eps,
            check_every=check_every,
            target_mse=target,
            guard=guard,
            frozen=frozen,
            gradients=torch.empty(gradients, dtype=torch.float32, device=device),
            scratch=torch.empty(scratch, dtype=DTYPES[precision], device=device),
            programs=programs,
            precision=precision,
        )
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        # The host's clock, for all networks of the call: a GPU's own counts from the start of each program.
        state.seconds[rows] = time.perf_counter() - begin


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
    if state.flat:
        if any(t.device != state.device for t in (points, values, state.mse, *state.flat)):
            got = f"points on {points.device}, values on {values.device}"
            raise bad_input("points and values", f"tensors on the state's device {state.device}", got, "Move them.")
        if any(
            flat.data_ptr() != stack[0].data_ptr()
            for flat, stack in zip(state.flat, [state.parameters, *stacks], strict=True)
        ):
            raise bad_input("state", "views of its flat tensors", "others", "Use FitState.fresh.")
    else:
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

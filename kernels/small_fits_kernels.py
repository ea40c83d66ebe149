"""The device code behind small_fits.py, which says how it works."""

import triton
import triton.language as tl

from .mm import mm, to_operand
from .optim import _one_minus_power
from .pieces import first_layer, load
from .trig import sincos

# Of ops.fit_small.FitState.reason.
_RUNNING = tl.constexpr(0)
_TARGET = tl.constexpr(1)
_BUDGET = tl.constexpr(2)
_NON_FINITE = tl.constexpr(3)
_DIVERGED = tl.constexpr(4)

_BLOCK_T = tl.constexpr(1024)
"""Parameters of a network that are updated at once."""


@triton.jit
def _hidden_zero(TARGET: tl.constexpr):
    """0, of which the compiler does not know that it is the same in every turn of a loop.

    Indices that begin at it are computed where they are used. Without, addresses of all phases are taken out of all
    loops, and hundreds of registers wait for them.
    """
    if TARGET == "cuda":
        zero = tl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [0], dtype=tl.int32, is_pure=False, pack=1)
    else:
        zero = 0
    return zero


@triton.jit
def _copy(to_ptr, from_ptr, begin, end):
    for start in range(0, end, _BLOCK_T):
        at = start + tl.arange(0, _BLOCK_T)
        mask = (at >= begin) & (at < end)
        tl.store(to_ptr + at, tl.load(from_ptr + at, mask=mask, other=0.0), mask=mask)


@triton.jit
def _clear(to_ptr, end):
    for start in range(0, end, _BLOCK_T):
        at = start + tl.arange(0, _BLOCK_T)
        tl.store(to_ptr + at, tl.zeros([_BLOCK_T], tl.float32), mask=at < end)


@triton.jit
def _sweep(
    x_ptr,  # [P, FIRST]
    values_ptr,  # [P, channels] of this network
    parameters_ptr,  # of this network; so are the gradients, times the scale and without omega
    gradients_ptr,
    omegas_ptr,  # [layers]
    scratch_ptr,  # [hidden + 1, 2, BLOCK_P, BLOCK_H]: sine and cosine of a tile by layer
    points,
    hidden,
    channels,
    frozen,
    scale,  # of the residuals
    backward,  # whether gradients are wanted
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The sum of the squared residuals of all points; gradients to memory."""
    units, columns, lanes = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_P)
    unit_mask, column_mask = units < WIDTH, columns < channels
    inner_mask = unit_mask[:, None] & unit_mask[None, :]
    head_mask = unit_mask[:, None] & column_mask[None, :]
    tile_at = lanes[:, None] * BLOCK_H + units[None, :]
    TILE: tl.constexpr = BLOCK_P * BLOCK_H
    FIRST_SIZE: tl.constexpr = WIDTH * (FIRST + 1)
    LAYER: tl.constexpr = WIDTH * (WIDTH + 1)
    # From one layer to the next all distances are known when compiling, so 32 bits do.
    head = FIRST_SIZE + hidden * LAYER
    head_at = head + columns[None, :] * WIDTH + units[:, None]  # transposed: [width, channels]
    head_w = to_operand(tl.load(parameters_ptr + head_at, mask=head_mask, other=0.0), PRECISION, TARGET)
    head_b = tl.load(parameters_ptr + head + channels * WIDTH + columns, mask=column_mask, other=0.0)
    first_omega = tl.load(omegas_ptr)
    squares = tl.zeros([BLOCK_C], tl.float32)
    head_dw = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    head_db = tl.zeros([BLOCK_C], tl.float32)
    first_db = tl.zeros([BLOCK_H], tl.float32)
    first_dw = tl.zeros([BLOCK_H, 4], tl.float32)
    for start in range(0, points, BLOCK_P):
        zero = _hidden_zero(TARGET)
        weights = tl.multiple_of(parameters_ptr + zero, 16)
        scratch = tl.multiple_of(scratch_ptr + zero, 16)
        sums = tl.multiple_of(gradients_ptr + zero, 16)
        rows = start + lanes
        row_mask = rows < points
        later = tl.zeros([BLOCK_H], tl.int32) + start > 0  # a tile came before this one
        z = first_omega * first_layer(
            x_ptr,
            weights,
            weights + WIDTH * FIRST,
            rows,
            row_mask,
            units,
            unit_mask,
            FIRST,
            1,
            FIRST,
            1,
            True,
            FIRST,
            BLOCK_P,
            BLOCK_H,
        )
        sine, cosine = sincos(z, PRECISION, TARGET)
        h = to_operand(sine, PRECISION, TARGET)
        tl.store(scratch + tile_at, h)
        tl.store(scratch + TILE + tile_at, to_operand(cosine, PRECISION, TARGET))
        for layer in range(hidden):
            own = weights + FIRST_SIZE + layer * LAYER
            omega = tl.load(omegas_ptr + 1 + layer)
            w = load(own + units[None, :] * WIDTH + units[:, None], inner_mask, WIDTH == BLOCK_H)  # transposed
            w = to_operand(omega * w, PRECISION, TARGET)
            b = omega * tl.load(own + WIDTH * WIDTH + units, mask=unit_mask, other=0.0)
            z = mm(h, w, tl.zeros([BLOCK_P, BLOCK_H], tl.float32), PRECISION, TARGET) + b[None, :]
            sine, cosine = sincos(z, PRECISION, TARGET)
            h = to_operand(sine, PRECISION, TARGET)
            saved = scratch + (layer + 1) * 2 * TILE + tile_at
            tl.store(saved, h)
            tl.store(saved + TILE, to_operand(cosine, PRECISION, TARGET))
        prediction = mm(h, head_w, tl.zeros([BLOCK_P, BLOCK_C], tl.float32), PRECISION, TARGET) + head_b[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        value = tl.load(values_ptr + rows[:, None] * channels + columns[None, :], mask=mask, other=0.0)
        r = tl.where(mask, prediction - value, 0.0)
        squares += tl.sum(r * r, axis=0)
        if backward:
            r *= scale
            head_db += tl.sum(r, axis=0)
            g = to_operand(r, PRECISION, TARGET)
            head_dw = mm(tl.trans(h), g, head_dw, PRECISION, TARGET)
            dh = mm(g, tl.trans(head_w), tl.zeros([BLOCK_P, BLOCK_H], tl.float32), PRECISION, TARGET)
            # Other threads read the scratch than wrote it.
            tl.debug_barrier()
            for turn in range(hidden - tl.maximum(frozen - 1, 0)):
                layer = hidden - 1 - turn
                saved = scratch + (layer + 1) * 2 * TILE + tile_at
                dz = dh * tl.load(saved + TILE).to(tl.float32)
                own = FIRST_SIZE + layer * LAYER
                db_at = sums + own + WIDTH * WIDTH + units
                db = tl.load(db_at, mask=unit_mask & later, other=0.0) + tl.sum(dz, axis=0)
                tl.store(db_at, db, mask=unit_mask)
                dz = to_operand(dz, PRECISION, TARGET)
                for chunk in range(0, BLOCK_H, CHUNK):  # some columns at a time: registers
                    ks = chunk + tl.arange(0, CHUNK)
                    dw_at = sums + own + units[:, None] * WIDTH + ks[None, :]
                    dw_mask = unit_mask[:, None] & (ks < WIDTH)[None, :]
                    before = tl.load(scratch + layer * 2 * TILE + lanes[:, None] * BLOCK_H + ks[None, :])
                    dw = tl.load(dw_at, mask=dw_mask & later[:, None], other=0.0)
                    tl.store(dw_at, mm(tl.trans(dz), before, dw, PRECISION, TARGET), mask=dw_mask)
                w = load(weights + own + units[:, None] * WIDTH + units[None, :], inner_mask, WIDTH == BLOCK_H)
                w = to_operand(tl.load(omegas_ptr + 1 + layer) * w, PRECISION, TARGET)
                dh = mm(dz, w, tl.zeros([BLOCK_P, BLOCK_H], tl.float32), PRECISION, TARGET)
            dz = dh * tl.load(scratch + TILE + tile_at).to(tl.float32)
            first_db += tl.sum(dz, axis=0)
            for k in tl.static_range(FIRST):
                x = tl.load(x_ptr + rows * FIRST + k, mask=row_mask, other=0.0)
                column = tl.sum(dz * x[:, None], axis=0)
                first_dw += tl.where((tl.arange(0, 4) == k)[None, :], column[:, None], 0.0)
            # The next tile overwrites the scratch.
            tl.debug_barrier()
    if backward:
        tl.store(gradients_ptr + head_at, head_dw, mask=head_mask)
        tl.store(gradients_ptr + head + channels * WIDTH + columns, head_db, mask=column_mask)
        ks = tl.arange(0, 4)
        first_mask = unit_mask[:, None] & (ks < FIRST)[None, :]
        tl.store(gradients_ptr + units[:, None] * FIRST + ks[None, :], first_dw, mask=first_mask)
        tl.store(gradients_ptr + WIDTH * FIRST + units, first_db, mask=unit_mask)
    return tl.sum(squares, axis=0)


@triton.jit
def _overflowed(gradients_ptr, begin, end):
    """1 where a gradient is not finite, else 0."""
    bad = tl.zeros([_BLOCK_T], tl.int32)
    for start in range(0, end, _BLOCK_T):
        at = start + tl.arange(0, _BLOCK_T)
        g = tl.load(gradients_ptr + at, mask=(at >= begin) & (at < end), other=0.0)
        bad = tl.where(tl.abs(g) < float("inf"), bad, 1)  # false for NaN too
    return tl.max(bad, axis=0)


@triton.jit
def _adam(
    parameters_ptr,  # of this network; so are the next four
    gradients_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    last_ptr,  # gets the parameters before the step
    omegas_ptr,
    begin,  # of the parameters that are trained
    end,
    hidden,
    unscale,
    step,  # updates done, this one included
    rate,
    beta1,
    beta2,
    rest1,  # 1 - beta1, rounded once
    rest2,
    log_beta1,
    log_beta2,
    eps,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """As optim._adam_kernel, with omega in the gradient's place of the copies."""
    FIRST_SIZE: tl.constexpr = WIDTH * (FIRST + 1)
    LAYER: tl.constexpr = WIDTH * (WIDTH + 1)
    t = step.to(tl.float32)
    size = rate / _one_minus_power(log_beta1, t)
    correction = tl.sqrt(_one_minus_power(log_beta2, t))
    for start in range(0, end, _BLOCK_T):
        at = start + tl.arange(0, _BLOCK_T)
        mask = (at >= begin) & (at < end)
        layer = tl.where(at < FIRST_SIZE, 0, 1 + tl.minimum((at - FIRST_SIZE) // LAYER, hidden))
        g = tl.load(gradients_ptr + at, mask=mask, other=0.0) * (tl.load(omegas_ptr + layer) * unscale)
        m = beta1 * tl.load(exp_avg_ptr + at, mask=mask, other=0.0) + rest1 * g
        v = beta2 * tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0) + rest2 * g * g
        tl.store(exp_avg_ptr + at, m, mask=mask)
        tl.store(exp_avg_sq_ptr + at, v, mask=mask)
        parameter = tl.load(parameters_ptr + at, mask=mask, other=0.0)
        tl.store(last_ptr + at, parameter, mask=mask)
        # With eps = 0, 0 / 0 must not move what has no gradient.
        denominator = tl.where(m == 0.0, 1.0, tl.sqrt(v) / correction + eps)
        tl.store(parameters_ptr + at, parameter - size * (m / denominator), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "until", "budget", "check_every", "points", "hidden", "channels", "frozen",
                               "trained_from", "parameters"])  # fmt: skip
def small_fits_kernel(
    x_ptr,  # [P, FIRST] float32, contiguous
    values_ptr,  # [N, P, channels] float32, contiguous
    parameters_ptr,  # [N, length]; so are the next three
    exp_avg_ptr,
    exp_avg_sq_ptr,
    best_ptr,  # unused without a guard
    rows_ptr,  # [num_rows] int64
    queue_ptr,  # [1] int32, 0 at first
    omegas_ptr,  # [layers], 1 for the head
    rates_ptr,  # [budget]
    target_ptr,  # [N] float64
    step_ptr,  # [N] int64; so are the integers that follow
    adam_step_ptr,
    scale_ptr,  # [N] float32, of the learning rate
    best_mse_ptr,  # [N] float64
    rollbacks_ptr,
    mse_ptr,  # [N, budget + 1]
    measured_ptr,
    reason_ptr,
    loss_scale_ptr,  # [N] float32: what residuals are multiplied by beyond residual_scale
    skipped_ptr,
    gradients_ptr,  # [programs, 2, length]: gradients, and parameters before the step
    scratch_ptr,  # [programs, hidden + 1, 2, BLOCK_P, BLOCK_H] operands
    num_rows,
    until,
    budget,
    check_every,
    points,
    hidden,  # layers after the first, without the head
    channels,
    frozen,  # layers
    trained_from,  # the first parameter that is trained
    parameters,  # of a network
    length,  # from a network to the next, at least `parameters`
    count,  # residuals, as a float
    residual_scale,  # 2 / count, times what keeps half precision in range
    unscale,  # one over the latter
    guard,  # 0: none
    beta1,
    beta2,
    rest1,
    rest2,
    log_beta1,
    log_beta2,
    eps,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Networks of the queue, one after the other, each to its next stop."""
    HALF: tl.constexpr = PRECISION == "fp16" or PRECISION == "bf16"
    program = tl.program_id(0).to(tl.int64)
    scratch_ptr += program * (hidden + 1) * (2 * BLOCK_P * BLOCK_H)
    gradients_ptr += program * 2 * length
    last_ptr = gradients_ptr + length
    place = tl.atomic_add(queue_ptr, 1)
    while place < num_rows:
        row = tl.load(rows_ptr + place)
        step = tl.load(step_ptr + row).to(tl.int32)
        moved, going = step * 0, step * 0 + 1
        while going > 0:
            at = row * length + _hidden_zero(TARGET)
            own, own_best = tl.multiple_of(parameters_ptr + at, 16), tl.multiple_of(best_ptr + at, 16)
            own_m, own_v = tl.multiple_of(exp_avg_ptr + at, 16), tl.multiple_of(exp_avg_sq_ptr + at, 16)
            squares = _sweep(
                x_ptr,
                values_ptr + row * points * channels,
                own,
                gradients_ptr,
                omegas_ptr,
                scratch_ptr,
                points,
                hidden,
                channels,
                frozen,
                residual_scale * tl.load(loss_scale_ptr + row),
                (step < until) & (step < budget),
                FIRST,
                WIDTH,
                BLOCK_P,
                BLOCK_C,
                BLOCK_H,
                CHUNK,
                PRECISION,
                TARGET,
            )
            # A network's numbers stay in memory: registers are for the sweep. All threads read them before one writes.
            best_mse, rollbacks = tl.load(best_mse_ptr + row), tl.load(rollbacks_ptr + row)
            target = tl.load(target_ptr + row)
            updates, skipped = tl.load(adam_step_ptr + row), tl.load(skipped_ptr + row)
            scale, loss_scale = tl.load(scale_ptr + row), tl.load(loss_scale_ptr + row)
            # What follows also reads gradients that other threads wrote.
            tl.debug_barrier()
            loss = squares / count
            mse = loss.to(tl.float64)
            tl.store(mse_ptr + row * (budget + 1) + step, loss)
            last = step >= budget
            check = (step % check_every == 0) | last
            leave = (step >= until) & (step < budget)
            bad = loss - loss != 0.0  # a number that is not finite
            lost = bad & (guard == 0.0)
            guarded = check & (leave == 0) & (guard > 0.0)
            spiked = guarded & (bad | (mse > guard * tl.minimum(best_mse, 1e300)))
            better = guarded & (spiked == 0) & (mse <= best_mse)
            # The last of these that holds.
            reason = tl.where(last, _BUDGET, _RUNNING)
            reason = tl.where(check & (mse <= target), _TARGET, reason)
            reason = tl.where(spiked, tl.where((rollbacks > 0) | last, _DIVERGED, _RUNNING), reason)
            reason = tl.where(leave, _RUNNING, reason)
            reason = tl.where(lost, _NON_FINITE, reason)
            going = tl.where(leave | (reason != _RUNNING), 0, 1)
            tl.store(reason_ptr + row, reason.to(tl.int64))
            tl.store(measured_ptr + row, tl.where(lost, step, step + 1).to(tl.int64))
            if better:
                _copy(own_best, own, 0, parameters)
                tl.store(best_mse_ptr + row, mse)
                # Adam overwrites what is read here.
                tl.debug_barrier()
            if lost & (moved > 0):
                _copy(own, last_ptr, trained_from, parameters)
            if spiked:
                _copy(own, own_best, 0, parameters)
                if going > 0:
                    _clear(own_m, parameters)
                    _clear(own_v, parameters)
                    tl.store(adam_step_ptr + row, rollbacks * 0)
                    tl.store(scale_ptr + row, scale * 0.5)
                    tl.store(rollbacks_ptr + row, rollbacks + 1)
            if (going > 0) & (spiked == 0):
                overflowed = step * 0
                if HALF:
                    overflowed = _overflowed(gradients_ptr, trained_from, parameters)
                if overflowed > 0:
                    tl.store(skipped_ptr + row, skipped + 1)
                    if PRECISION == "fp16":  # the other half precision has the range of float32
                        tl.store(loss_scale_ptr + row, tl.maximum(loss_scale * 0.0625, 2.0**-64))
                else:
                    tl.store(adam_step_ptr + row, updates + 1)
                    moved += 1
                    _adam(
                        own,
                        gradients_ptr,
                        own_m,
                        own_v,
                        last_ptr,
                        omegas_ptr,
                        trained_from,
                        parameters,
                        hidden,
                        unscale / loss_scale,
                        updates + 1,
                        tl.load(rates_ptr + step) * scale,
                        beta1,
                        beta2,
                        rest1,
                        rest2,
                        log_beta1,
                        log_beta2,
                        eps,
                        FIRST,
                        WIDTH,
                    )
            step += going
            # The next sweep reads what other threads wrote here, and writes what they read.
            tl.debug_barrier()
        tl.store(step_ptr + row, step.to(tl.int64))
        place = tl.atomic_add(queue_ptr, 1)

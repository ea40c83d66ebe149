"""The optimiser's side of a training step: gradients summed up, Adam, rounded copies of the weights.

Buffers are as segments.py describes them. What changes from step to step lives in device memory: a CUDA graph may
replay any launcher. Sums run in a fixed order, the only atomics are on integers: same bits every time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import cdiv, check_precision, check_same_device, check_size, check_tensor, launch_options, wrong
from .chip import current_chip
from .heads import LOSS_SPLITS, check_losses
from .heads_kernels import store_loss
from .mm import to_operand
from .segments import DTYPES, Table

# Columns of Table.fields, as Table._row orders them.
_SIZE = tl.constexpr(0)
_MATRIX = tl.constexpr(1)  # elements of a matrix
_COLUMNS = tl.constexpr(2)
_OFFSET = tl.constexpr(3)
_COUNT = tl.constexpr(4)
_SPLITS = tl.constexpr(5)  # 0: not trained
_PARTIAL = tl.constexpr(6)
_PARTIAL_SPLIT = tl.constexpr(7)  # strides
_PARTIAL_MATRIX = tl.constexpr(8)
_PARTIAL_ROW = tl.constexpr(9)
_COPY = tl.constexpr(10)
_TRANSPOSED = tl.constexpr(11)
_COPY_MATRIX = tl.constexpr(12)  # strides
_COPY_ROW = tl.constexpr(13)
_TRANSPOSED_ROW = tl.constexpr(14)
_EXACT = tl.constexpr(15)
_FIELDS = tl.constexpr(16)  # segments.FIELDS


@triton.jit
def _locate(blocks_ptr, fields_ptr, num_blocks, BLOCK: tl.constexpr):
    """group, segment, its fields, and of a program's elements the place in the segment and the mask."""
    # One grid axis for blocks and groups: the others end at 65535.
    program = tl.program_id(0)
    group = (program // num_blocks).to(tl.int64)
    entry = blocks_ptr + 2 * (program % num_blocks)
    segment = tl.load(entry)
    element = tl.load(entry + 1) + tl.arange(0, BLOCK)
    fields = fields_ptr + segment * _FIELDS
    return group, segment, fields, element, element < tl.load(fields + _SIZE)


@triton.jit
def _coordinates(fields, element):
    """Matrix in the group's stack, row and column of elements."""
    size = tl.load(fields + _MATRIX).to(tl.int32)
    columns = tl.load(fields + _COLUMNS).to(tl.int32)
    matrix = element // size
    inside = element - matrix * size
    row = inside // columns
    return matrix, row, inside - row * columns


@triton.jit
def _reduce_kernel(
    partials_ptr,  # flat
    gradients_ptr,  # [G, T]
    bad_ptr,  # [G] int32
    blocks_ptr,  # [blocks, 2] int32
    fields_ptr,  # [segments, fields] int64
    scales_ptr,  # [segments, 2]
    num_blocks,
    length,  # T
    programs,  # that reduce; those after them store losses
    sums_ptr,  # as in heads_kernels.store_loss
    norm_ptr,
    losses_ptr,
    splits_of_losses,
    stride_s,
    channels,
    signals_per_group,
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if BLOCK_C > 0:
        if tl.program_id(0) >= programs:
            store_loss(
                tl.program_id(0) - programs, sums_ptr, norm_ptr, losses_ptr, bad_ptr, splits_of_losses, stride_s,
                channels, signals_per_group, True, BLOCK_S, BLOCK_C,
            )  # fmt: skip
            return
    group, segment, fields, element, mask = _locate(blocks_ptr, fields_ptr, num_blocks, BLOCK)
    matrix, row, column = _coordinates(fields, element)
    # Where the group's stack begins takes 64 bits, what is inside of it 32.
    stack = tl.load(fields + _PARTIAL_MATRIX)
    partials_ptr += tl.load(fields + _PARTIAL) + group * tl.load(fields + _COUNT) * stack
    at = matrix * stack.to(tl.int32) + row * tl.load(fields + _PARTIAL_ROW).to(tl.int32) + column
    stride, splits = tl.load(fields + _PARTIAL_SPLIT), tl.load(fields + _SPLITS).to(tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, splits, AT_ONCE):  # loads of several splits under way at once, added in order
        for i in tl.static_range(AT_ONCE):
            split = first + i
            sums += tl.load(partials_ptr + split * stride + at, mask=mask & (split < splits), other=0.0)
    gradient = sums * tl.load(scales_ptr + 2 * segment)
    tl.store(gradients_ptr + (group * length + tl.load(fields + _OFFSET)) + element, gradient, mask=mask)
    finite = tl.abs(gradient) < float("inf")  # false for NaN too
    wrong = tl.max(tl.where(finite, 0, 1), axis=0)
    tl.atomic_max(bad_ptr + group, wrong, mask=wrong > 0, sem="relaxed")


@triton.jit
def _store_copies(
    parameter,  # [BLOCK]
    copies_ptr,
    bias_copies_ptr,
    scales_ptr,
    group,
    segment,
    fields,
    element,
    mask,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    matrix, row, column = _coordinates(fields, element)
    scaled = parameter * tl.load(scales_ptr + 2 * segment + 1)
    rounded = to_operand(scaled, PRECISION, TARGET).to(copies_ptr.dtype.element_ty)
    copy, transposed = tl.load(fields + _COPY), tl.load(fields + _TRANSPOSED)
    exact = tl.load(fields + _EXACT) != 0
    stack = tl.load(fields + _COPY_MATRIX)
    first, matrix = group * tl.load(fields + _COUNT) * stack, matrix * stack.to(tl.int32)
    at = matrix + row * tl.load(fields + _COPY_ROW).to(tl.int32) + column
    tl.store(bias_copies_ptr + (copy + first) + at, scaled, mask=mask & (copy >= 0) & exact)
    tl.store(copies_ptr + (copy + first) + at, rounded, mask=mask & (copy >= 0) & (exact == 0))
    at = matrix + column * tl.load(fields + _TRANSPOSED_ROW).to(tl.int32) + row
    tl.store(copies_ptr + (transposed + first) + at, rounded, mask=mask & (transposed >= 0))


@triton.jit
def _copies_kernel(
    parameters_ptr,  # [G, T]
    copies_ptr,  # flat
    bias_copies_ptr,  # flat
    blocks_ptr,
    fields_ptr,
    scales_ptr,
    num_blocks,
    length,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    group, segment, fields, element, mask = _locate(blocks_ptr, fields_ptr, num_blocks, BLOCK)
    first = group * length + tl.load(fields + _OFFSET)
    parameter = tl.load(parameters_ptr + first + element, mask=mask, other=0.0)
    _store_copies(
        parameter, copies_ptr, bias_copies_ptr, scales_ptr, group, segment, fields, element, mask, PRECISION, TARGET
    )


@triton.jit
def _one_minus_power(log_beta, t):
    """1 - beta^t for scalars. Where beta^t is near 1 the difference would lose digits: there the series of expm1."""
    x = log_beta * t
    near = tl.maximum(x, -1.0)
    series = near * 0.0 + 1.0
    for i in tl.static_range(10):
        series = tl.fma(series * near, 1.0 / (11 - i), 1.0)
    return tl.where(x > -1.0, -near * series, 1.0 - tl.exp(x))


@triton.jit
def _adam_kernel(
    parameters_ptr,  # [G, T]; so are the next three and previous
    gradients_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    previous_ptr,  # unused unless PREVIOUS
    step_ptr,  # [G] int32
    learning_rate_ptr,  # [G]
    bad_ptr,  # [G] int32
    skipped_ptr,  # [G] int32; so is the next; unused unless ADVANCE
    arrived_ptr,
    copies_ptr,  # flat
    bias_copies_ptr,  # flat
    blocks_ptr,
    fields_ptr,
    scales_ptr,
    num_blocks,
    length,
    beta1,
    beta2,
    rest1,  # 1 - beta1, rounded once
    rest2,
    log_beta1,
    log_beta2,
    eps,
    PREVIOUS: tl.constexpr,
    ADVANCE: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    group, segment, fields, element, inside = _locate(blocks_ptr, fields_ptr, num_blocks, BLOCK)
    good = inside & (tl.load(bad_ptr + group) == 0)
    mask = good & (tl.load(fields + _SPLITS) > 0)
    first = group * length + tl.load(fields + _OFFSET)
    parameter = tl.load(parameters_ptr + first + element, mask=good, other=0.0)
    if PREVIOUS:
        tl.store(previous_ptr + first + element, parameter, mask=good)
    gradient = tl.load(gradients_ptr + first + element, mask=mask, other=0.0)
    m = beta1 * tl.load(exp_avg_ptr + first + element, mask=mask, other=0.0) + rest1 * gradient
    v = beta2 * tl.load(exp_avg_sq_ptr + first + element, mask=mask, other=0.0) + rest2 * gradient * gradient
    t = (tl.load(step_ptr + group) + 1).to(tl.float32)
    size = tl.load(learning_rate_ptr + group) / _one_minus_power(log_beta1, t)
    denominator = tl.sqrt(v) / tl.sqrt(_one_minus_power(log_beta2, t)) + eps
    parameter -= size * (m / tl.where(mask, denominator, 1.0))
    tl.store(exp_avg_ptr + first + element, m, mask=mask)
    tl.store(exp_avg_sq_ptr + first + element, v, mask=mask)
    tl.store(parameters_ptr + first + element, parameter, mask=mask)
    _store_copies(
        parameter, copies_ptr, bias_copies_ptr, scales_ptr, group, segment, fields, element, mask, PRECISION, TARGET
    )
    if ADVANCE:
        # The last of a group's programs to get here counts the step: all others have read what that changes.
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + group, 1, sem="acq_rel") == num_blocks - 1:
            bad = tl.load(bad_ptr + group)
            tl.store(step_ptr + group, tl.load(step_ptr + group) + tl.where(bad == 0, 1, 0))
            tl.store(skipped_ptr + group, tl.load(skipped_ptr + group) + tl.where(bad == 0, 0, 1))
            tl.store(bad_ptr + group, bad * 0)
            tl.store(arrived_ptr + group, bad * 0)


@triton.jit
def _advance_kernel(step_ptr, bad_ptr, skipped_ptr, groups, BLOCK: tl.constexpr):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = group < groups
    bad = tl.load(bad_ptr + group, mask=mask, other=0)
    tl.store(step_ptr + group, tl.load(step_ptr + group, mask=mask, other=0) + 1, mask=mask & (bad == 0))
    tl.store(skipped_ptr + group, tl.load(skipped_ptr + group, mask=mask, other=0) + 1, mask=mask & (bad != 0))
    tl.store(bad_ptr + group, tl.zeros_like(bad), mask=mask)


def _check_flat(table, **buffers):
    """That buffers fit the table: [G, T], all with one T, which is returned."""
    check_same_device(table=table.fields, **buffers)
    for name, buffer in buffers.items():
        check_tensor(name, buffer, (table.groups, None), contiguous=True)
    length = next(iter(buffers.values())).shape[1]
    for name, buffer in buffers.items():
        if buffer.shape[1] != length or length < table.elements:
            expected = f"shape [{table.groups}, T], T the same for all and at least {table.elements}"
            raise wrong(name, expected, list(buffer.shape), "Allocate [table.groups, table.elements].")
    return length


def _check_groups(groups, **vectors):
    """That counters are [G] int32."""
    for name, vector in vectors.items():
        check_tensor(name, vector, (groups,), (torch.int32,), contiguous=True)


def _check_copies(table, copies, bias_copies, precision):
    check_precision(precision)
    check_same_device(table=table.fields, copies=copies, bias_copies=bias_copies)
    check_size("copies", copies, DTYPES[precision], table.copies)
    check_size("bias_copies", bias_copies, torch.float32, table.bias_copies)


def launch_reduce(
    table: Table,
    partials: Tensor,
    gradients: Tensor,  # [G, T]
    bad: Tensor,  # [G] int32
    losses: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:
    """gradients = factor * the partial sums of each segment, added in order; 0 where a segment is not trained.

    Args:
        partials: float32, flat, table.partials elements or more; see Segment.
        gradients: [G, T] float32, overwritten where there are segments.
        bad: [G] int32, set to 1 for groups with a gradient or a loss that is not finite and else left alone.
        losses: sums, norm and losses of heads.launch_losses, which is then not needed.
    """
    length = _check_flat(table, gradients=gradients)
    check_same_device(table=table.fields, partials=partials, bad=bad)
    check_size("partials", partials, torch.float32, table.partials)
    _check_groups(table.groups, bad=bad)
    signals = channels = 0
    if losses is not None:
        signals, channels = losses[2].shape[0], check_losses(*losses, bad)
    sums, norm, out = losses or (partials, partials, partials)
    programs = table.num_blocks * table.groups
    if programs + signals:
        _reduce_kernel[(programs + signals,)](
            *(partials, gradients, bad, table.blocks, table.fields, table.scales, table.num_blocks, length, programs),
            *(sums, norm, out, sums.shape[0], sums.stride(0), channels, max(signals // table.groups, 1)),
            BLOCK=table.block,
            AT_ONCE=16,
            BLOCK_S=LOSS_SPLITS,
            BLOCK_C=triton.next_power_of_2(channels) if signals else 0,
            **launch_options(8, 1),
        )


def launch_adam(
    table: Table,
    parameters: Tensor,  # [G, T]
    gradients: Tensor,  # [G, T]
    exp_avg: Tensor,  # [G, T]
    exp_avg_sq: Tensor,  # [G, T]
    step: Tensor,  # [G] int32
    learning_rate: Tensor,  # [G]
    bad: Tensor,  # [G] int32
    copies: Tensor | None,
    bias_copies: Tensor | None,
    previous: Tensor | None = None,  # [G, T]
    counts: tuple[Tensor, Tensor] | None = None,  # [G] int32 each
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    precision: str = "fp32",
) -> None:
    """One step of Adam (Kingma and Ba 2015, algorithm 1, as torch.optim.Adam) and the copies of the new parameters.

    Args:
        parameters, exp_avg, exp_avg_sq: [G, T] float32, updated; gradients: [G, T] float32.
        step: [G] int32, updates done before this one; counted here with `counts`, else by launch_advance.
        learning_rate: [G] float32.
        bad: [G] int32; of groups where it is not 0 nothing is written.
        copies: flat, of DTYPES[precision]; bias_copies: flat, float32; None where no segment has such copies.
        previous: [G, T] float32, overwritten with the parameters before the step; None where it is not needed.
        counts: skipped, as of launch_advance, which is then not needed; and a counter of this launch's own, zeros.
    """
    length = _check_flat(
        table,
        parameters=parameters,
        gradients=gradients,
        exp_avg=exp_avg,
        exp_avg_sq=exp_avg_sq,
        **({} if previous is None else {"previous": previous}),
    )
    check_same_device(table=table.fields, step=step, learning_rate=learning_rate, bad=bad)
    skipped, arrived = counts or (bad, bad)
    check_same_device(table=table.fields, skipped=skipped, arrived=arrived)
    _check_groups(table.groups, step=step, bad=bad, skipped=skipped, arrived=arrived)
    check_tensor("learning_rate", learning_rate, (table.groups,), contiguous=True)
    _check_copies(table, copies, bias_copies, precision)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise wrong(name, "a number in [0, 1)", beta, "Use 0.9 and 0.999 if unsure.")
    if not eps >= 0:
        raise wrong("eps", "0 or more", eps, "Use 1e-8 if unsure.")
    if table.num_blocks * table.groups:
        _adam_kernel[(table.num_blocks * table.groups,)](
            *(parameters, gradients, exp_avg, exp_avg_sq, parameters if previous is None else previous),
            *(step, learning_rate, bad, skipped, arrived),
            *(parameters if copies is None else copies, parameters if bias_copies is None else bias_copies),
            *(table.blocks, table.fields, table.scales, table.num_blocks, length),
            *(float(beta1), float(beta2), 1.0 - beta1, 1.0 - beta2),
            *(math.log(beta) if beta else -1e30 for beta in (beta1, beta2)),
            float(eps),
            PREVIOUS=previous is not None,
            ADVANCE=counts is not None,
            BLOCK=table.block,
            PRECISION=precision,
            TARGET=current_chip().target,
            **launch_options(8, 1),
        )


def launch_advance(step: Tensor, bad: Tensor, skipped: Tensor) -> None:
    """Count a step: step += 1 for good groups, skipped += 1 for bad ones, then bad = 0. All [G] int32, updated."""
    check_same_device(step=step, bad=bad, skipped=skipped)
    _check_groups(None, step=step)
    _check_groups(len(step), bad=bad, skipped=skipped)
    if step.numel():
        _advance_kernel[(cdiv(step.numel(), 1024),)](step, bad, skipped, step.numel(), BLOCK=1024)


def launch_copies(
    table: Table, parameters: Tensor, copies: Tensor | None, bias_copies: Tensor | None, *, precision: str = "fp32"
) -> None:
    """Write the copies of all segments, trained or not. Arguments as of launch_adam."""
    length = _check_flat(table, parameters=parameters)
    _check_copies(table, copies, bias_copies, precision)
    if table.num_blocks * table.groups:
        _copies_kernel[(table.num_blocks * table.groups,)](
            *(parameters, parameters if copies is None else copies),
            *(parameters if bias_copies is None else bias_copies, table.blocks, table.fields, table.scales),
            *(table.num_blocks, length),
            BLOCK=table.block,
            PRECISION=precision,
            TARGET=current_chip().target,
            **launch_options(8, 1),
        )

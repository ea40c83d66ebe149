"""Muon's side of a training step: momenta of the hidden matrices into stacks, orthogonalised directions back out.

    gradients --launch_momenta--> momentum; Nesterov's momentum in stacks of one shape
    stacks --newton_schulz--> directions, one batch for all layers of one shape
    directions --launch_muon_update--> hidden weights and their rounded copies

All else is Adam's: optim.launch_adam on a table that does not train the hidden weights. Groups whose gradient is not
finite keep weights and momenta.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_same_device, check_size, check_tensor, launch_options
from .chip import current_chip
from .optim import _OFFSET, _check_copies, _check_flat, _check_groups, _locate, _store_copies
from .segments import Table
from .stacks import Stacks, at_stacked, in_stack


@triton.jit
def _momenta_kernel(
    gradients_ptr,  # [G, T]
    momentum_ptr,  # [G, T]
    bad_ptr,  # [G] int32
    momenta_ptr,  # stacked
    stack_fields_ptr,
    blocks_ptr,
    fields_ptr,
    num_blocks,
    length,
    keep,  # share of the momentum that stays
    rest,  # 1 - keep, rounded once
    BLOCK: tl.constexpr,
):
    group, segment, fields, element, mask = _locate(blocks_ptr, fields_ptr, num_blocks, BLOCK)
    mask &= (tl.load(bad_ptr + group) == 0) & in_stack(stack_fields_ptr, segment)
    at = group * length + tl.load(fields + _OFFSET) + element
    gradient = tl.load(gradients_ptr + at, mask=mask, other=0.0)
    before = tl.load(momentum_ptr + at, mask=mask, other=0.0)
    momentum = before + rest * (gradient - before)
    tl.store(momentum_ptr + at, momentum, mask=mask)
    where = at_stacked(stack_fields_ptr, group, segment, fields, element)
    tl.store(momenta_ptr + where, gradient + keep * (momentum - gradient), mask=mask)


@triton.jit
def _muon_update_kernel(
    parameters_ptr,  # [G, T]
    learning_rate_ptr,  # [G]
    bad_ptr,  # [G] int32
    directions_ptr,  # stacked
    factors_ptr,  # [segments], of the learning rate
    stack_fields_ptr,
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
    mask &= (tl.load(bad_ptr + group) == 0) & in_stack(stack_fields_ptr, segment)
    at = group * length + tl.load(fields + _OFFSET) + element
    where = at_stacked(stack_fields_ptr, group, segment, fields, element)
    step = tl.load(learning_rate_ptr + group) * tl.load(factors_ptr + segment)
    parameter = tl.load(parameters_ptr + at, mask=mask, other=0.0)
    parameter -= step * tl.load(directions_ptr + where, mask=mask, other=0.0)
    tl.store(parameters_ptr + at, parameter, mask=mask)
    _store_copies(
        parameter, copies_ptr, bias_copies_ptr, scales_ptr, group, segment, fields, element, mask, PRECISION, TARGET
    )


def launch_momenta(
    table: Table,
    stacks: Stacks,
    gradients: Tensor,  # [G, T]
    momentum: Tensor,  # [G, T]
    bad: Tensor,  # [G] int32
    momenta: Tensor,
    *,
    keep: float,
) -> None:
    """momentum = keep momentum + (1 - keep) gradient; momenta = the same once more from there (Nesterov).

    Args:
        gradients: [G, T] float32. momentum: [G, T] float32, updated where a segment is in `stacks`.
        bad: of groups where it is not 0 nothing is written.
        momenta: flat, float32, stacks.size elements.
    """
    length = _check_flat(table, gradients=gradients, momentum=momentum)
    _check_groups(table.groups, bad=bad)
    check_same_device(table=table.fields, bad=bad, momenta=momenta, stacks=stacks.fields)
    check_size("momenta", momenta, torch.float32, stacks.size)
    if table.num_blocks * table.groups:
        _momenta_kernel[(table.num_blocks * table.groups,)](
            *(gradients, momentum, bad, momenta, stacks.fields, table.blocks, table.fields, table.num_blocks, length),
            *(keep, 1.0 - keep),
            BLOCK=table.block,
            **launch_options(8, 1),
        )


def launch_muon_update(
    table: Table,
    stacks: Stacks,
    parameters: Tensor,  # [G, T]
    learning_rate: Tensor,  # [G]
    bad: Tensor,  # [G] int32
    directions: Tensor,
    factors: Tensor,  # [segments]
    copies: Tensor,
    bias_copies: Tensor,
    *,
    precision: str,
) -> None:
    """parameters -= learning_rate * factor * direction where a segment is in `stacks`; and their copies.

    Args:
        directions: flat, float32, stacks.size elements. factors: [segments] float32.
        bad: of groups where it is not 0 nothing is written.
        copies, bias_copies, precision: as of optim.launch_adam.
    """
    length = _check_flat(table, parameters=parameters)
    _check_groups(table.groups, bad=bad)
    check_tensor("learning_rate", learning_rate, (table.groups,), contiguous=True)
    check_tensor("factors", factors, (len(table.segments),), contiguous=True)
    check_same_device(table=table.fields, bad=bad, directions=directions, factors=factors, rate=learning_rate)
    check_size("directions", directions, torch.float32, stacks.size)
    _check_copies(table, copies, bias_copies, precision)
    if table.num_blocks * table.groups:
        _muon_update_kernel[(table.num_blocks * table.groups,)](
            *(parameters, learning_rate, bad, directions, factors, stacks.fields, copies, bias_copies),
            *(table.blocks, table.fields, table.scales, table.num_blocks, length),
            BLOCK=table.block,
            PRECISION=precision,
            TARGET=current_chip().target,
            **launch_options(8, 1),
        )

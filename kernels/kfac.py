"""K-FAC's side of a training step: steps that raised a loss are taken back, preconditioned gradients are stepped along.

    losses, gradients --launch_settle--> weights, gradients and velocity that count; gradients joined, layer by layer
    joined --(G + g I)^-1 . (A + a I)^-1, two batched products for all layers of one shape--> directions
    directions --launch_kfac_update--> velocity, weights, rounded copies of the weights

Buffers are as segments.py describes them; what K-FAC adds is `Joined`, where the gradients of a weight [out, in] and of
its bias [out] stand side by side as [out, in + 1], the form in which its factors apply to both. Decisions are taken on
the device and every launch may be recorded: the host learns of them when it reads the losses.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_same_device, check_size, check_tensor, launch_options, wrong
from .chip import current_chip
from .optim import _OFFSET, _check_copies, _check_flat, _check_groups, _locate, _store_copies
from .segments import Table
from .stacks import Stacks, at_stacked

ALIGNED = 8
"""Rows of joined matrices are padded to a multiple of this: products load 16 bytes at a time."""


class Joined(Stacks):
    """Gradients of weights and biases side by side, and the factors that they are multiplied by.

    Args:
        table: of the parameters, weight and bias of each layer in turn, all of them trained.
        device: of the buffers.

    `gradients` is written by launch_settle, `directions` = (G + g I)^-1 gradients (A + a I)^-1 by `precondition`;
    `inverse_a` and `inverse_g` are views [matrices, in + 1, in + 1] and [matrices, out, out] of each layer.
    """

    def __init__(self, table: Table, device: torch.device) -> None:
        weights = table.segments[::2]
        super().__init__(table, range(len(weights)), True, ALIGNED, device)
        # Padding stays zero: nothing writes it, and the factors' padding meets nothing else.
        self.gradients, self.directions = (torch.zeros(self.size, device=device) for _ in range(2))
        self._half = torch.empty(self.size, device=device)
        self._factors = [
            tuple(torch.zeros(b.shape[0], n, n, device=device) for n in (b.columns, b.rows)) for b in self.banks
        ]
        self.inverse_a: list[Tensor] = []
        self.inverse_g: list[Tensor] = []
        for layer, s in enumerate(weights):
            bank, own = self.rows_of(layer)
            a, g = self._factors[self.banks.index(bank)]
            self.inverse_a.append(a[own, : s.columns + 1, : s.columns + 1])
            self.inverse_g.append(g[own])

    def fill(self, gradients: Sequence[Tensor], factor: float) -> None:
        """Gradients times a factor from those of each weight [matrices, out, in] and bias [matrices, out] in turn."""
        for layer, (weight, bias) in enumerate(zip(gradients[::2], gradients[1::2], strict=True)):
            joined = self.layer(self.gradients, layer)
            torch.mul(weight, factor, out=joined[..., : weight.shape[-1]])
            torch.mul(bias, factor, out=joined[..., weight.shape[-1]])

    def precondition(self) -> None:
        """Directions from gradients and factors: two batched products a shape, in float32, on memory of its own."""
        for bank, (a, g) in zip(self.banks, self._factors, strict=True):
            half = torch.bmm(g, self.stack(self.gradients, bank), out=self.stack(self._half, bank))
            torch.bmm(half, a, out=self.stack(self.directions, bank))


@triton.jit(do_not_specialize=["signals"])
def _decide_kernel(
    losses_ptr,  # [G * signals]
    settled_ptr,  # [G * signals]
    bad_ptr,  # [G] int32; so are the next three
    skipped_ptr,
    good_ptr,
    moved_ptr,
    best_ptr,  # [G]; so are the next two
    rate_ptr,
    left_ptr,
    signals,
    growth,
    cut,
    smoothing,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, signals, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(losses_ptr + group * signals + at, mask=at < signals, other=0.0)
    loss = tl.sum(total, axis=0)
    best = tl.load(best_ptr + group)
    fresh = best == float("inf")  # nothing to compare with yet
    bad = tl.load(bad_ptr + group) != 0
    good = ((loss <= best) | fresh) & (bad == 0)
    # Share of the loss that the step left; one that was taken back has left all of it.
    share = tl.where(good, tl.where(fresh, 0.0, loss / tl.where(fresh, 1.0, best)), 1.0)
    share = tl.where(share == share, share, 1.0)  # 0 of 0
    moved = tl.load(moved_ptr + group) != 0
    rate, left = tl.load(rate_ptr + group), tl.load(left_ptr + group)
    tl.store(rate_ptr + group, rate * tl.where(good, growth, cut), mask=moved)
    tl.store(left_ptr + group, smoothing * left + (1.0 - smoothing) * share, mask=moved)
    tl.store(best_ptr + group, loss, mask=good)
    tl.store(good_ptr + group, good.to(tl.int32))
    tl.store(moved_ptr + group, moved.to(tl.int32) * 0)
    tl.store(skipped_ptr + group, tl.load(skipped_ptr + group) + bad.to(tl.int32))
    tl.store(bad_ptr + group, bad.to(tl.int32) * 0)
    tell = tl.where(good, 1, tl.where(fresh, 1, 0))
    for first in range(0, signals, BLOCK):
        at = first + tl.arange(0, BLOCK)
        mask = at < signals
        own = tl.load(losses_ptr + group * signals + at, mask=mask, other=0.0)
        before = tl.load(settled_ptr + group * signals + at, mask=mask, other=0.0)
        # A first loss is told even where its gradient overflowed.
        tl.store(settled_ptr + group * signals + at, own, mask=mask & (tl.where(before == before, tell, 1) != 0))


@triton.jit
def _settle_kernel(
    parameters_ptr,  # [G, T]; so are the next four
    gradients_ptr,
    kept_ptr,
    kept_gradients_ptr,
    velocity_ptr,
    good_ptr,  # [G] int32
    joined_ptr,
    joined_fields_ptr,
    blocks_ptr,
    fields_ptr,
    num_blocks,
    length,
    factor,
    BLOCK: tl.constexpr,
):
    group, segment, fields, element, mask = _locate(blocks_ptr, fields_ptr, num_blocks, BLOCK)
    good = tl.load(good_ptr + group) != 0
    fine, back = mask & good, mask & (good == 0)
    at = group * length + tl.load(fields + _OFFSET) + element
    parameter = tl.load(parameters_ptr + at, mask=fine, other=0.0)
    tl.store(kept_ptr + at, parameter, mask=fine)
    tl.store(parameters_ptr + at, tl.load(kept_ptr + at, mask=back, other=0.0), mask=back)
    tl.store(velocity_ptr + at, tl.zeros_like(parameter), mask=back)
    gradient = tl.load(gradients_ptr + at, mask=fine, other=0.0)
    kept = tl.load(kept_gradients_ptr + at, mask=back, other=0.0)
    tl.store(kept_gradients_ptr + at, gradient, mask=fine)
    tl.store(gradients_ptr + at, kept, mask=back)
    where = at_stacked(joined_fields_ptr, group, segment, fields, element)
    tl.store(joined_ptr + where, factor * tl.where(good, gradient, kept), mask=mask)


@triton.jit
def _kfac_update_kernel(
    parameters_ptr,  # [G, T]; so are the next two
    velocity_ptr,
    previous_ptr,
    learning_rate_ptr,  # [G]; so are the next two
    rate_ptr,
    left_ptr,
    moved_ptr,  # [G] int32
    directions_ptr,
    joined_fields_ptr,
    copies_ptr,  # flat
    bias_copies_ptr,  # flat
    blocks_ptr,
    fields_ptr,
    scales_ptr,
    num_blocks,
    length,
    least,
    most,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    group, segment, fields, element, mask = _locate(blocks_ptr, fields_ptr, num_blocks, BLOCK)
    at = group * length + tl.load(fields + _OFFSET) + element
    momentum = tl.minimum(tl.maximum(tl.load(left_ptr + group), least), most)
    step = tl.load(learning_rate_ptr + group) * tl.load(rate_ptr + group)
    where = at_stacked(joined_fields_ptr, group, segment, fields, element)
    direction = tl.load(directions_ptr + where, mask=mask, other=0.0)
    velocity = momentum * tl.load(velocity_ptr + at, mask=mask, other=0.0) + step * direction
    before = tl.load(parameters_ptr + at, mask=mask, other=0.0)
    parameter = before - velocity
    tl.store(previous_ptr + at, before, mask=mask)
    tl.store(velocity_ptr + at, velocity, mask=mask)
    tl.store(parameters_ptr + at, parameter, mask=mask)
    # One block of a group says that it has moved.
    said = (segment == 0) & (element == 0)
    tl.store(moved_ptr + group + element * 0, tl.full([BLOCK], 1, tl.int32), mask=said)
    _store_copies(
        parameter, copies_ptr, bias_copies_ptr, scales_ptr, group, segment, fields, element, mask, PRECISION, TARGET
    )


def launch_settle(
    table: Table,
    joined: Joined,
    parameters: Tensor,  # [G, T]
    gradients: Tensor,  # [G, T]
    kept: Tensor,  # [G, T]
    kept_gradients: Tensor,  # [G, T]
    velocity: Tensor,  # [G, T]
    losses: Tensor,  # [signals]
    settled: Tensor,  # [signals]
    bad: Tensor,  # [G] int32
    skipped: Tensor,  # [G] int32
    good: Tensor,  # [G] int32
    moved: Tensor,  # [G] int32
    best: Tensor,  # [G]
    rate: Tensor,  # [G]
    left: Tensor,  # [G]
    *,
    growth: float,
    cut: float,
    smoothing: float,
    factor: float,
) -> None:
    """Take back the steps that raised a group's loss, or ended in a loss or gradient that is not finite.

    A group is good where the sum of its losses is at most `best`, or `best` is infinite, and `bad` is 0. There weights
    and gradients are kept and `best` is its loss; elsewhere the kept ones are put back and the velocity is zero. Where
    a group has moved since the last call its rate is multiplied by growth or cut, and `left` takes in, as a moving
    average, the share of the loss that the step left.

    Args:
        parameters, gradients, kept, kept_gradients, velocity: [G, T] float32, updated.
        losses: [signals] float32, of the groups in turn.
        settled: losses of the weights that count, NaN before the first call; updated.
        bad: as launch_reduce leaves it; back to 0. skipped: counts groups that were bad.
        good: overwritten. moved: back to 0; launch_kfac_update sets it.
        best, rate, left: [G] float32, updated.
        factor: of the gradients in `joined`.
    """
    flat = {"parameters": parameters, "gradients": gradients, "kept": kept}
    length = _check_flat(table, **flat, kept_gradients=kept_gradients, velocity=velocity)
    _check_groups(table.groups, bad=bad, skipped=skipped, good=good, moved=moved)
    numbers = {"best": best, "rate": rate, "left": left}
    for name, each in numbers.items():
        check_tensor(name, each, (table.groups,), contiguous=True)
    check_tensor("losses", losses, (None,), contiguous=True)
    check_tensor("settled", settled, losses.shape, contiguous=True)
    check_same_device(table=table.fields, losses=losses, settled=settled, bad=bad, joined=joined.gradients, **numbers)
    check_size("joined", joined.gradients, torch.float32, joined.gradients.numel())
    if not table.num_blocks * table.groups:
        return
    if len(losses) % table.groups:
        raise wrong("losses", f"as many for each of {table.groups} groups", len(losses), "Pass all signals.")
    signals = len(losses) // table.groups
    _decide_kernel[(table.groups,)](
        *(losses, settled, bad, skipped, good, moved, best, rate, left, signals, growth, cut, smoothing),
        BLOCK=min(1024, triton.next_power_of_2(signals)),
        **launch_options(1, 1),
    )
    _settle_kernel[(table.num_blocks * table.groups,)](
        *(parameters, gradients, kept, kept_gradients, velocity, good, joined.gradients, joined.fields),
        *(table.blocks, table.fields, table.num_blocks, length, factor),
        BLOCK=table.block,
        **launch_options(8, 1),
    )


def launch_kfac_update(
    table: Table,
    joined: Joined,
    parameters: Tensor,  # [G, T]
    velocity: Tensor,  # [G, T]
    previous: Tensor,  # [G, T]
    learning_rate: Tensor,  # [G]
    rate: Tensor,  # [G]
    left: Tensor,  # [G]
    moved: Tensor,  # [G] int32
    copies: Tensor,
    bias_copies: Tensor,
    *,
    momentum: Sequence[float],
    precision: str,
) -> None:
    """velocity = m velocity + learning_rate * rate * direction; parameters -= velocity; their copies.

    Args:
        parameters, velocity: [G, T] float32, updated. previous: overwritten with the parameters before.
        momentum: least and most; in between m is `left`.
        copies, bias_copies, precision: as of launch_adam.
    """
    length = _check_flat(table, parameters=parameters, velocity=velocity, previous=previous)
    _check_groups(table.groups, moved=moved)
    numbers = {"learning_rate": learning_rate, "rate": rate, "left": left}
    for name, each in numbers.items():
        check_tensor(name, each, (table.groups,), contiguous=True)
    check_same_device(table=table.fields, moved=moved, joined=joined.directions, **numbers)
    _check_copies(table, copies, bias_copies, precision)
    least, most = momentum
    if table.num_blocks * table.groups:
        _kfac_update_kernel[(table.num_blocks * table.groups,)](
            *(parameters, velocity, previous, learning_rate, rate, left, moved, joined.directions, joined.fields),
            *(copies, bias_copies, table.blocks, table.fields, table.scales, table.num_blocks, length),
            *(float(least), float(most)),
            BLOCK=table.block,
            PRECISION=precision,
            TARGET=current_chip().target,
            **launch_options(8, 1),
        )

"""The optimisers' side of a training step: gradients summed up, Adam, rounded copies of the weights, Muon's products.

The parameters of a model lie in one float32 buffer [G, T]: T numbers for each of G groups that are optimised, counted
and skipped independently (N networks of their own: G = N; networks that share an encoder: G = 1). Gradients and
moments lie in buffers of the same shape. A Table says where in a row each weight and bias is, so one launch covers
all of them. What changes from step to step lives in device memory: a CUDA graph may replay any launcher.

Sums run in a fixed order, the only atomics are on integers: same bits every time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl

from .checks import check_same_device, check_tensor, launch_options, wrong
from .chip import current_chip
from .mm import PRECISIONS, mm, to_operand

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What `copies` hold, by precision."""


@dataclass(frozen=True)
class Segment:
    """One weight or one bias of a model; in each group a stack of `count` matrices."""

    count: int  # matrices in a group: 1, or N for stacked layers of a coupled model
    rows: int  # out features
    columns: int  # in features; 1 for a bias
    offset: int  # first element in a row of the flat buffers; [count, rows, columns] there
    partial: int = -1  # first element in `partials`; [splits, G * count, partial_rows, partial_columns] there
    partial_rows: int = 0
    partial_columns: int = 0
    splits: int = 1  # partial sums to add up, S
    copy: int = -1  # first element in `copies`; [G * count, copy_rows, copy_columns] there; -1: none
    transposed: int = -1  # first element in `copies`; [G * count, copy_columns, copy_rows] there; -1: none
    copy_rows: int = 0  # what pads the copies is never written
    copy_columns: int = 0
    factor: float = 1.0  # gradient = factor * sum of the partial sums
    omega: float = 1.0  # copy = omega * parameter
    exact: bool = False  # the copy is not rounded and lies in `bias_copies`: biases, layers that no matrix unit sees
    trained: bool = True  # False: gradient 0, never updated; needs no partial sums

    @property
    def size(self) -> int:
        """Elements in a group."""
        return self.count * self.rows * self.columns


# Columns of Table.fields.
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
_FIELDS = tl.constexpr(16)


class Table:
    """The segments of a model on a device: what every launcher here but Newton-Schulz's goes by.

    Args:
        segments: of one group; they must not overlap in any buffer.
        groups: G.
        device: of all buffers.
        block: elements per program, a power of two; None: what suits the chip.

    `elements` (the smallest T), `partials`, `copies` and `bias_copies` are the sizes that buffers need.
    """

    def __init__(self, segments: Sequence[Segment], groups: int, device: torch.device | str, block: int | None = None):
        # The interpreter pays per operation, not per number.
        self.block = block or (8192 if current_chip().target == "interpreter" else 1024)
        self.segments, self.groups = tuple(segments), groups
        for i, s in enumerate(self.segments):
            _check_segment(f"segments[{i}]", s)
        self.elements = _end("offset", [(s.offset, s.size) for s in self.segments])
        self.partials = _end(
            "partial", [(s.partial, s.splits * self._padded(s, "partial")) for s in self.segments if s.trained]
        )
        copies = [(s.copy, self._padded(s, "copy"), s.exact) for s in self.segments if s.copy >= 0]
        turned = [(s.transposed, self._padded(s, "copy"), False) for s in self.segments if s.transposed >= 0]
        self.copies = _end("copy", [(first, size) for first, size, exact in copies + turned if not exact])
        self.bias_copies = _end("copy", [(first, size) for first, size, exact in copies if exact])

        rows = [self._row(s) for s in self.segments]
        blocks = [(i, first) for i, s in enumerate(self.segments) for first in range(0, s.size, self.block)]
        self.num_blocks = len(blocks)
        self.fields = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, _FIELDS.value)
        scales = [(s.factor, s.omega) for s in self.segments]
        self.scales = torch.tensor(scales, dtype=torch.float32, device=device).view(-1, 2)
        self.blocks = torch.tensor(blocks, dtype=torch.int32, device=device).view(-1, 2)

    def _padded(self, s: Segment, kind: str) -> int:
        return self.groups * s.count * int(getattr(s, f"{kind}_rows")) * int(getattr(s, f"{kind}_columns"))

    def _row(self, s: Segment) -> list[int]:
        splits = s.splits if s.trained else 0
        partial_matrix, copy_matrix = s.partial_rows * s.partial_columns, s.copy_rows * s.copy_columns
        return [
            *(s.size, s.rows * s.columns, s.columns, s.offset, s.count),
            *(splits, s.partial, self._padded(s, "partial"), partial_matrix, s.partial_columns),
            *(s.copy, s.transposed, copy_matrix, s.copy_columns, s.copy_rows, int(s.exact)),
        ]


def _check_segment(name: str, s: Segment) -> None:
    # Within a group's stack the kernels count in 32 bits.
    most = s.count * max(s.rows * s.columns, s.partial_rows * s.partial_columns, s.copy_rows * s.copy_columns)
    if min(s.count, s.rows, s.columns) < 1 or s.offset < 0 or most >= 2**31 - 2**16:
        raise wrong(
            name,
            "positive sizes, an offset of 0 or more and fewer than 2^31 elements with padding",
            s,
            "Split a larger stack into several segments.",
        )
    for kind, first in (("partial", s.partial if s.trained else -1), ("copy", max(s.copy, s.transposed))):
        padded = (getattr(s, f"{kind}_rows"), getattr(s, f"{kind}_columns"))
        if first >= 0 and (padded[0] < s.rows or padded[1] < s.columns):
            expected = f"{kind}_rows and {kind}_columns of at least {s.rows} and {s.columns}"
            raise wrong(name, expected, padded, "Give the sizes with padding.")
    if s.trained and (s.partial < 0 or s.splits < 1 or not math.isfinite(s.factor)):
        got = f"partial {s.partial}, splits {s.splits}, factor {s.factor}"
        raise wrong(name, "partial >= 0, splits >= 1 and a finite factor", got, "Set them, or trained=False.")
    if s.exact and s.transposed >= 0:
        raise wrong(name, "no transposed copy beside an exact one", f"transposed {s.transposed}", "Leave it at -1.")


def _end(name: str, ranges: list[tuple[int, int]]) -> int:
    """Where the last of (first, size) ends; they may not overlap."""
    ends = sorted((first, first + size) for first, size in ranges)
    for (_, end), (first, _) in pairwise(ends):
        if first < end:
            raise wrong(name, f"the next segment at {end} or later", first, "Place segments so that none overlap.")
    return ends[-1][1] if ends else 0


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
    BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
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


def _check_size(name, tensor, dtype, size):
    """That a flat buffer has at least `size` elements; None will do for none."""
    if tensor is None and size == 0:
        return
    if tensor is None or tensor.ndim != 1 or len(tensor) < size:
        got = None if tensor is None else f"shape {list(tensor.shape)}"
        raise wrong(name, f"a flat tensor of at least {size} elements", got, "Allocate it at the size stated.")
    check_tensor(name, tensor, (None,), (dtype,), contiguous=True)


def _check_groups(groups, **vectors):
    """That counters are [G] int32."""
    for name, vector in vectors.items():
        check_tensor(name, vector, (groups,), (torch.int32,), contiguous=True)


def _check_copies(table, copies, bias_copies, precision):
    _check_precision(precision)
    check_same_device(table=table.fields, copies=copies, bias_copies=bias_copies)
    _check_size("copies", copies, DTYPES[precision], table.copies)
    _check_size("bias_copies", bias_copies, torch.float32, table.bias_copies)


def _check_precision(precision):
    if precision not in PRECISIONS:
        raise wrong("precision", f"one of {', '.join(PRECISIONS)}", repr(precision), "Choose one of these.")


def launch_reduce(table, partials, gradients, bad):
    """gradients = factor * the partial sums of each segment, added in order; 0 where a segment is not trained.

    Args:
        partials: float32, flat, table.partials elements or more; see Segment.
        gradients: [G, T] float32, overwritten where there are segments.
        bad: [G] int32, set to 1 for groups with a gradient that is not finite and else left alone.
    """
    length = _check_flat(table, gradients=gradients)
    check_same_device(table=table.fields, partials=partials, bad=bad)
    _check_size("partials", partials, torch.float32, table.partials)
    _check_groups(table.groups, bad=bad)
    if table.num_blocks * table.groups:
        _reduce_kernel[(table.num_blocks * table.groups,)](
            *(partials, gradients, bad, table.blocks, table.fields, table.scales, table.num_blocks, length),
            BLOCK=table.block,
            AT_ONCE=4,
            **launch_options(8, 1),
        )


def launch_adam(
    table,
    parameters,
    gradients,
    exp_avg,
    exp_avg_sq,
    step,
    learning_rate,
    bad,
    copies,
    bias_copies,
    previous=None,
    *,
    beta1=0.9,
    beta2=0.999,
    eps=1e-8,
    precision="fp32",
):
    """One step of Adam (Kingma and Ba 2015, algorithm 1, as torch.optim.Adam) and the copies of the new parameters.

    Args:
        parameters, exp_avg, exp_avg_sq: [G, T] float32, updated; gradients: [G, T] float32.
        step: [G] int32, updates done before this one; launch_advance counts.
        learning_rate: [G] float32.
        bad: [G] int32; of groups where it is not 0 nothing is written.
        copies: flat, of DTYPES[precision]; bias_copies: flat, float32; None where no segment has such copies.
        previous: [G, T] float32, overwritten with the parameters before the step; None where it is not needed.
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
    _check_groups(table.groups, step=step, bad=bad)
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
            *(step, learning_rate, bad),
            *(parameters if copies is None else copies, parameters if bias_copies is None else bias_copies),
            *(table.blocks, table.fields, table.scales, table.num_blocks, length),
            *(float(beta1), float(beta2), 1.0 - beta1, 1.0 - beta2),
            *(math.log(beta) if beta else -1e30 for beta in (beta1, beta2)),
            float(eps),
            PREVIOUS=previous is not None,
            BLOCK=table.block,
            PRECISION=precision,
            TARGET=current_chip().target,
            **launch_options(8, 1),
        )


def launch_advance(step, bad, skipped):
    """Count a step: step += 1 for good groups, skipped += 1 for bad ones, then bad = 0. All [G] int32, updated."""
    check_same_device(step=step, bad=bad, skipped=skipped)
    _check_groups(None, step=step)
    _check_groups(len(step), bad=bad, skipped=skipped)
    if step.numel():
        _advance_kernel[(triton.cdiv(step.numel(), 1024),)](step, bad, skipped, step.numel(), BLOCK=1024)


def launch_copies(table, parameters, copies, bias_copies, *, precision="fp32"):
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


_SQUARES_BLOCK = 4096


@triton.jit
def _squares_kernel(x_ptr, parts_ptr, size, parts, BLOCK: tl.constexpr):
    """Sums of squares of blocks of each matrix: x [N, size] -> [N, parts]."""
    program = tl.program_id(0)
    offsets = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (program // parts).to(tl.int64) * size + offsets, mask=offsets < size, other=0.0)
    tl.store(parts_ptr + program, tl.sum(x * x, axis=0))


@triton.jit
def _normalise_kernel(
    x_ptr,  # [N, size]
    parts_ptr,  # [N, parts]
    y_ptr,  # [N, size]
    size,
    parts,
    eps,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """y = x / (Frobenius norm + eps)."""
    program = tl.program_id(0)
    matrix = (program // parts).to(tl.int64)
    each = tl.arange(0, PARTS)
    squares = tl.sum(tl.load(parts_ptr + matrix * parts + each, mask=each < parts, other=0.0), axis=0)
    offsets = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + matrix * size + offsets, mask=mask, other=0.0)
    y = to_operand(x / (tl.sqrt(squares) + eps), PRECISION, TARGET)
    tl.store(y_ptr + matrix * size + offsets, y, mask=mask)


@triton.jit
def _product_kernel(
    a_ptr,  # [N, m, k] by strides
    b_ptr,  # [N, k, n] by strides
    d_ptr,  # [N, m, n], with the strides of c
    c_ptr,  # [N, m, n] by strides
    alpha,
    beta,
    m,
    n,
    k,
    stride_an,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    stride_bc,
    stride_cn,
    stride_cm,
    stride_cc,
    BETA: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """c = alpha a b, and with BETA + beta d; c is rounded as an operand of the next product, unless it is the last."""
    program = tl.program_id(0)
    across, down = tl.cdiv(n, BLOCK_N), tl.cdiv(m, BLOCK_M)
    matrix = (program // (across * down)).to(tl.int64)
    rows = ((program // across) % down) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (program % across) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask, column_mask = (rows < m)[:, None], (columns < n)[None, :]
    ks = tl.arange(0, BLOCK_K)
    a_at = a_ptr + matrix * stride_an + rows[:, None].to(tl.int64) * stride_am
    b_at = b_ptr + matrix * stride_bn + columns[None, :].to(tl.int64) * stride_bc
    sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, k, BLOCK_K):
        inner = (first + ks).to(tl.int64)
        a = tl.load(a_at + inner[None, :] * stride_ak, mask=row_mask & (inner < k)[None, :], other=0.0)
        b = tl.load(b_at + inner[:, None] * stride_bk, mask=(inner < k)[:, None] & column_mask, other=0.0)
        sums = mm(a, b, sums, PRECISION, TARGET)
    at = matrix * stride_cn + rows[:, None].to(tl.int64) * stride_cm + columns[None, :].to(tl.int64) * stride_cc
    sums *= alpha
    if BETA:
        sums += beta * tl.load(d_ptr + at, mask=row_mask & column_mask, other=0.0).to(tl.float32)
    if LAST:
        tl.store(c_ptr + at, sums, mask=row_mask & column_mask)
    else:
        tl.store(c_ptr + at, to_operand(sums, PRECISION, TARGET), mask=row_mask & column_mask)


def _scratch_sizes(shape, precision):
    """Elements of the sums of squares, of X twice and of A and its update."""
    matrices, size, side = shape[0], shape[1] * shape[2], min(shape[1:])
    sums = matrices * triton.cdiv(size, _SQUARES_BLOCK) * (4 // DTYPES[precision].itemsize)
    # A multiple of 16 elements, so that what follows may be fetched 16 bytes at a time.
    return [triton.cdiv(sums, 16) * 16, *2 * [matrices * size], *2 * [matrices * side * side]]


def newton_schulz_scratch(shape, precision="fp32"):
    """Elements of scratch, of DTYPES[precision], that launch_newton_schulz needs for stacks `shape` [N, out, in]."""
    return sum(_scratch_sizes(shape, precision))


def launch_newton_schulz(
    x, out, scratch, *, steps=5, precision="fp32", coefficients=(3.4445, -4.7750, 2.0315), eps=1e-7
):
    """Muon's orthogonalisation of stacks of matrices: singular values are driven to about 1, zeros stay zero.

    X = x / (Frobenius norm + eps), then `steps` times X = a X + (b A + c A A) X with A = X X^T, taken on the smaller
    side. X and A are kept rounded to `precision`: terms that cancel must see the same numbers.

    Args:
        x: [N, out, in] float32, contiguous. out: of its shape, overwritten; may be x.
        scratch: flat, of DTYPES[precision], newton_schulz_scratch(x.shape, precision) elements or more.
        steps: 1 or more.
        coefficients: a, b, c.
    """
    _check_precision(precision)
    check_same_device(x=x, out=out, scratch=scratch)
    check_tensor("x", x, (None, None, None), contiguous=True)
    check_tensor("out", out, x.shape, contiguous=True)
    if len(coefficients) != 3 or steps < 1:
        raise wrong("coefficients, steps", "three numbers, 1 or more", f"{coefficients}, {steps}", "Use the defaults.")
    if x.numel() == 0:
        return
    sizes = _scratch_sizes(x.shape, precision)
    _check_size("scratch", scratch, DTYPES[precision], sum(sizes))
    squares, now, then, gram, update = torch.split(scratch[: sum(sizes)], sizes)
    squares = squares.view(torch.float32)
    a, b, c = (float(number) for number in coefficients)
    matrices, outputs, inputs = x.shape
    size, short, long = outputs * inputs, min(outputs, inputs), max(outputs, inputs)
    # A tall matrix is worked on as its transpose, by strides alone.
    whole = (size, inputs, 1) if outputs <= inputs else (size, 1, inputs)
    turned = (whole[0], whole[2], whole[1])
    square = (short * short, short, 1)
    target = current_chip().target
    # The interpreter pays per operation, not per number.
    block = min(128, max(32, triton.next_power_of_2(short))) if target == "interpreter" else 64

    def product(
        left, left_strides, right, right_strides, add, result, strides, columns, inner, alpha, beta, last=False
    ):
        _product_kernel[(matrices * triton.cdiv(short, block) * triton.cdiv(columns, block),)](
            *(left, right, add, result, alpha, beta, short, columns, inner),
            *(*left_strides, *right_strides, *strides),
            BETA=beta != 0,
            LAST=last,
            BLOCK_M=block,
            BLOCK_N=block,
            BLOCK_K=block if target == "interpreter" else 32,
            PRECISION=precision,
            TARGET=target,
        )

    parts = triton.cdiv(size, _SQUARES_BLOCK)
    _squares_kernel[(matrices * parts,)](x, squares, size, parts, BLOCK=_SQUARES_BLOCK)
    _normalise_kernel[(matrices * parts,)](
        *(x, squares, now, size, parts, float(eps)),
        BLOCK=_SQUARES_BLOCK,
        PARTS=triton.next_power_of_2(parts),
        PRECISION=precision,
        TARGET=target,
    )
    for i in range(steps):
        last = i == steps - 1
        product(now, whole, now, turned, gram, gram, square, short, long, 1.0, 0.0)
        product(gram, square, gram, square, gram, update, square, short, short, c, b)
        product(update, square, now, whole, now, out if last else then, whole, long, short, 1.0, a, last)
        now, then = then, now

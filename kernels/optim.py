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
        self.device = self.fields.device

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
    # Within a segment the kernels count in 32 bits.
    if min(s.count, s.rows, s.columns) < 1 or s.offset < 0 or s.size >= 2**31 - 2**16:
        raise ValueError(
            f"{name}: expected positive sizes, an offset of 0 or more and fewer than 2^31 elements, got {s}. "
            "Split a larger stack into several segments."
        )
    for kind, first in (("partial", s.partial if s.trained else -1), ("copy", max(s.copy, s.transposed))):
        padded = (getattr(s, f"{kind}_rows"), getattr(s, f"{kind}_columns"))
        if first >= 0 and (padded[0] < s.rows or padded[1] < s.columns):
            raise ValueError(
                f"{name}: expected {kind}_rows and {kind}_columns of at least {s.rows} and {s.columns}, got {padded}. "
                "Give the sizes with padding."
            )
    if s.trained and (s.partial < 0 or s.splits < 1 or not math.isfinite(s.factor)):
        raise ValueError(
            f"{name}: expected partial sums (partial >= 0, splits >= 1, a finite factor), got partial {s.partial}, "
            f"splits {s.splits}, factor {s.factor}. Set them, or trained=False."
        )
    if s.exact and s.transposed >= 0:
        raise ValueError(
            f"{name}: expected no transposed copy beside an exact one, got transposed {s.transposed}. Leave it at -1."
        )


def _end(name: str, ranges: list[tuple[int, int]]) -> int:
    """Where the last of (first, size) ends; they may not overlap."""
    ends = sorted((first, first + size) for first, size in ranges)
    for (_, end), (first, _) in pairwise(ends):
        if first < end:
            raise ValueError(
                f"{name}: expected segments that do not overlap, got one that begins at {first} before another ends "
                f"at {end}. Place it at {end} or later."
            )
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
def _coordinates(group, fields, element):
    """Matrix in the stack of all groups (int64), row and column of elements."""
    size = tl.load(fields + _MATRIX).to(tl.int32)
    columns = tl.load(fields + _COLUMNS).to(tl.int32)
    matrix = element // size
    inside = element - matrix * size
    row = inside // columns
    return group * tl.load(fields + _COUNT) + matrix, row, inside - row * columns


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
    matrix, row, column = _coordinates(group, fields, element)
    at = tl.load(fields + _PARTIAL) + matrix * tl.load(fields + _PARTIAL_MATRIX)
    at += row * tl.load(fields + _PARTIAL_ROW) + column
    stride, splits = tl.load(fields + _PARTIAL_SPLIT), tl.load(fields + _SPLITS).to(tl.int32)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, splits, AT_ONCE):  # loads of several splits under way at once, added in order
        for i in tl.static_range(AT_ONCE):
            split = first + i
            sums += tl.load(partials_ptr + at + split * stride, mask=mask & (split < splits), other=0.0)
    gradient = sums * tl.load(scales_ptr + 2 * segment)
    tl.store(gradients_ptr + group * length + tl.load(fields + _OFFSET) + element, gradient, mask=mask)
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
    matrix, row, column = _coordinates(group, fields, element)
    scaled = parameter * tl.load(scales_ptr + 2 * segment + 1)
    rounded = to_operand(scaled, PRECISION, TARGET).to(copies_ptr.dtype.element_ty)
    copy, transposed = tl.load(fields + _COPY), tl.load(fields + _TRANSPOSED)
    exact = tl.load(fields + _EXACT) != 0
    first = matrix * tl.load(fields + _COPY_MATRIX)
    at = copy + first + row * tl.load(fields + _COPY_ROW) + column
    tl.store(bias_copies_ptr + at, scaled, mask=mask & (copy >= 0) & exact)
    tl.store(copies_ptr + at, rounded, mask=mask & (copy >= 0) & (exact == 0))
    at = transposed + first + column * tl.load(fields + _TRANSPOSED_ROW) + row
    tl.store(copies_ptr + at, rounded, mask=mask & (transposed >= 0))


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
    at = group * length + tl.load(fields + _OFFSET) + element
    parameter = tl.load(parameters_ptr + at, mask=mask, other=0.0)
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
    at = group * length + tl.load(fields + _OFFSET) + element
    parameter = tl.load(parameters_ptr + at, mask=good, other=0.0)
    if PREVIOUS:
        tl.store(previous_ptr + at, parameter, mask=good)
    gradient = tl.load(gradients_ptr + at, mask=mask, other=0.0)
    m = beta1 * tl.load(exp_avg_ptr + at, mask=mask, other=0.0) + rest1 * gradient
    v = beta2 * tl.load(exp_avg_sq_ptr + at, mask=mask, other=0.0) + rest2 * gradient * gradient
    t = (tl.load(step_ptr + group) + 1).to(tl.float32)
    size = tl.load(learning_rate_ptr + group) / _one_minus_power(log_beta1, t)
    denominator = tl.sqrt(v) / tl.sqrt(_one_minus_power(log_beta2, t)) + eps
    parameter -= size * (m / tl.where(mask, denominator, 1.0))
    tl.store(exp_avg_ptr + at, m, mask=mask)
    tl.store(exp_avg_sq_ptr + at, v, mask=mask)
    tl.store(parameters_ptr + at, parameter, mask=mask)
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


@triton.jit
def _squares_kernel(x_ptr, parts_ptr, size, parts, BLOCK: tl.constexpr):
    """Sums of squares of blocks of each matrix: x [N, size] -> [N, parts]."""
    program = tl.program_id(0)
    offsets = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (program // parts).to(tl.int64) * size + offsets, mask=offsets < size, other=0.0)
    tl.store(parts_ptr + program, tl.sum(x * x, axis=0))


@triton.jit
def _normalise_kernel(x_ptr, parts_ptr, y_ptr, size, parts, eps, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """y = x / (Frobenius norm + eps), x and y [N, size]."""
    program = tl.program_id(0)
    matrix = (program // parts).to(tl.int64)
    each = tl.arange(0, PARTS)
    squares = tl.sum(tl.load(parts_ptr + matrix * parts + each, mask=each < parts, other=0.0), axis=0)
    offsets = (program % parts) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < size
    x = tl.load(x_ptr + matrix * size + offsets, mask=mask, other=0.0)
    tl.store(y_ptr + matrix * size + offsets, x / (tl.sqrt(squares) + eps), mask=mask)


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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    TARGET: tl.constexpr,
):
    """c = alpha a b, and with BETA + beta d; float32 in memory, operands rounded to PRECISION."""
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
        sums += beta * tl.load(d_ptr + at, mask=row_mask & column_mask, other=0.0)
    tl.store(c_ptr + at, sums, mask=row_mask & column_mask)


def _check(name, tensor, dtype, device, shape=None, size=None):
    """That a tensor is contiguous, of dtype, on device, and of a shape or flat with at least `size` elements."""
    fits = isinstance(tensor, torch.Tensor) and tensor.dtype == dtype and tensor.device == device
    fits = fits and tensor.is_contiguous()
    if fits and (tuple(tensor.shape) == tuple(shape) if shape is not None else tensor.ndim == 1 and len(tensor) >= size):
        return
    wanted = f"of shape {list(shape)}" if shape is not None else f"of one dimension and at least {size} elements"
    got = repr(tensor)
    if isinstance(tensor, torch.Tensor):
        got = f"{tensor.dtype} {list(tensor.shape)} with strides {tensor.stride()} on {tensor.device}"
    raise ValueError(
        f"{name}: expected a contiguous {dtype} tensor {wanted} on {device}, got {got}. "
        "Convert it, or call .contiguous(), or make it as large as the table says."
    )


def _check_flat(table, **buffers):
    """That buffers [G, T] fit the table; T."""
    first = next(iter(buffers.values()))
    length = max(first.shape[-1] if isinstance(first, torch.Tensor) and first.ndim else 0, table.elements)
    for name, buffer in buffers.items():
        _check(name, buffer, torch.float32, table.device, (table.groups, length))
    return length


def _check_copies(table, copies, bias_copies, precision):
    if precision not in PRECISIONS:
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}. Choose one of these.")
    if copies is not None or table.copies:
        _check("copies", copies, DTYPES[precision], table.device, size=table.copies)
    if bias_copies is not None or table.bias_copies:
        _check("bias_copies", bias_copies, torch.float32, table.device, size=table.bias_copies)


def launch_reduce(table, partials, gradients, bad):
    """gradients = factor * the partial sums of each segment, added in order; 0 where a segment is not trained.

    Args:
        partials: float32, flat, table.partials elements or more; see Segment.
        gradients: [G, T] float32, overwritten where there are segments.
        bad: [G] int32, set to 1 for groups with a gradient that is not finite and else left alone.
    """
    length = _check_flat(table, gradients=gradients)
    _check("partials", partials, torch.float32, table.device, size=table.partials)
    _check("bad", bad, torch.int32, table.device, (table.groups,))
    if table.num_blocks * table.groups:
        _reduce_kernel[(table.num_blocks * table.groups,)](
            *(partials, gradients, bad, table.blocks, table.fields, table.scales, table.num_blocks, length),
            BLOCK=table.block,
            AT_ONCE=4,
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
    for name, tensor, dtype in (
        ("step", step, torch.int32),
        ("learning_rate", learning_rate, torch.float32),
        ("bad", bad, torch.int32),
    ):
        _check(name, tensor, dtype, table.device, (table.groups,))
    _check_copies(table, copies, bias_copies, precision)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: expected a number in [0, 1), got {beta}. Use 0.9 and 0.999 if unsure.")
    if not eps >= 0:
        raise ValueError(f"eps: expected 0 or more, got {eps}. Use 1e-8 if unsure.")
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
        )


def launch_advance(step, bad, skipped):
    """Count a step: step += 1 for good groups, skipped += 1 for bad ones, then bad = 0. All [G] int32, updated."""
    for name, tensor in (("step", step), ("bad", bad), ("skipped", skipped)):
        _check(name, tensor, torch.int32, step.device, (step.numel(),))
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
        )

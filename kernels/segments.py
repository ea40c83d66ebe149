"""Where each weight and bias of a model is, in the flat buffers that the optimiser's kernels work on.

The parameters of a model lie in one float32 buffer [G, T]: T numbers for each of G groups that are optimised, counted
and skipped independently (N networks of their own: G = N; networks that share an encoder: G = 1). Gradients and
moments lie in buffers of the same shape. A Table says where in a row each weight and bias is, so one launch covers
all of them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from .checks import wrong
from .chip import current_chip

DTYPES = {
    **dict.fromkeys(("fp32", "tf32x3", "tf32"), torch.float32),
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
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


FIELDS = 16
"""Numbers of a row of Table.fields."""


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
        self.fields = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, FIELDS)
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

"""Matrices of one shape side by side: a form of a model's gradients in which one product, or one iteration, serves all.

The flat buffers of segments.py hold a layer's weight and bias wherever they begin; here the matrices of all layers of
one shape, of all networks, are one stack [layers * matrices, rows, columns].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import cdiv
from .optim import _COUNT, _coordinates
from .segments import Table

# Columns of Stacks.fields.
_BASE = tl.constexpr(0)  # -1: not in a stack
_MATRIX_STRIDE = tl.constexpr(1)
_ROW_STRIDE = tl.constexpr(2)
_STACK_FIELDS = tl.constexpr(3)


@dataclass(frozen=True)
class Bank:
    """The stack of some layers of one shape."""

    layers: tuple[int, ...]
    matrices: int  # of each layer, G * count
    rows: int
    columns: int  # with padding
    start: int  # first element in a buffer

    @property
    def shape(self) -> tuple[int, int, int]:
        """[layers * matrices, rows, columns]"""
        return len(self.layers) * self.matrices, self.rows, self.columns


class Stacks:
    """Where the matrices of some layers lie in flat buffers of `size` elements.

    Args:
        table: of the parameters, weight and bias of each layer in turn.
        layers: whose weights are in.
        with_biases: whether a bias stands behind its weight's last column: [out, in + 1].
        aligned: rows are padded to a multiple of this.
        device: of the buffers.
    """

    def __init__(
        self, table: Table, layers: Sequence[int], with_biases: bool, aligned: int, device: torch.device
    ) -> None:
        own = {i: table.segments[2 * i] for i in layers}
        shapes = {
            i: (table.groups * s.count, s.rows, cdiv(s.columns + with_biases, aligned) * aligned)
            for i, s in own.items()
        }
        self.banks: list[Bank] = []
        self.size = 0
        for shape in dict.fromkeys(shapes.values()):
            self.banks.append(Bank(tuple(i for i in own if shapes[i] == shape), *shape, self.size))
            self.size += math.prod(self.banks[-1].shape)
        places = {i: (bank, bank.layers.index(i) * bank.matrices) for bank in self.banks for i in bank.layers}
        rows = [(-1, 0, 0)] * len(table.segments)
        for i, (bank, first) in places.items():
            strides = bank.rows * bank.columns, bank.columns
            base = bank.start + first * strides[0]
            rows[2 * i] = (base, *strides)
            if with_biases:
                rows[2 * i + 1] = (base + own[i].columns, *strides)
        self.fields = torch.tensor(rows, dtype=torch.int64, device=device)
        self._places = places

    def stack(self, buffer: Tensor, bank: Bank) -> Tensor:
        """[layers * matrices, rows, columns] of one shape."""
        return buffer[bank.start : bank.start + math.prod(bank.shape)].view(bank.shape)

    def rows_of(self, layer: int) -> tuple[Bank, slice]:
        """The bank of a layer, and which of its matrices are the layer's."""
        bank, first = self._places[layer]
        return bank, slice(first, first + bank.matrices)

    def layer(self, buffer: Tensor, layer: int) -> Tensor:
        """[matrices, rows, columns] of one layer."""
        bank, own = self.rows_of(layer)
        return self.stack(buffer, bank)[own]


@triton.jit
def in_stack(stack_fields_ptr, segment):
    """Whether a segment is in a stack."""
    return tl.load(stack_fields_ptr + segment * _STACK_FIELDS + _BASE) >= 0


@triton.jit
def at_stacked(stack_fields_ptr, group, segment, fields, element):
    """Where elements of a segment lie in a stacked buffer."""
    matrix, row, column = _coordinates(fields, element)
    own = stack_fields_ptr + segment * _STACK_FIELDS
    stride = tl.load(own + _MATRIX_STRIDE)
    first = tl.load(own + _BASE) + group * tl.load(fields + _COUNT) * stride
    return first + matrix * stride.to(tl.int32) + row * tl.load(own + _ROW_STRIDE).to(tl.int32) + column

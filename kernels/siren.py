"""A training step of sine networks, layer by layer over waves of points: what is launched when, on what memory.

A wave is as many points as keep its activations within WAVE_ELEMENTS a layer, so memory does not grow with the image.
All sizes are padded: rows to whole tiles, widths so that rows begin at 16 bytes. Weights in the padding are zero,
hence sines, gradients and their products there are exactly zero, and no kernel has to know.

    coordinates --first layer--> h1 --W2--> h2, c2 --W3--> h3, c3 ... --heads--> loss
    dz of a layer = (dz of the next @ W) * c, stored once; dW = dz^T h as partial sums that optim.launch_reduce adds up,
    those of all hidden layers of one shape in one launch

Stored per wave and hidden layer: h = sin(z), c = cos(z) and dz, all as operands (2 bytes in half precision). Of the
first layer h alone: its cosine is computed from coordinates, its dz never exists. The cosine is stored rather than z:
as many bytes, no second range reduction, and in half precision an error of 2^-12 where z of size 8 would have 2^-8.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .chains import launch_forward_chain, launch_gradient_chain
from .checks import cdiv
from .configs import FEW_INPUTS
from .heads import heads_splits, launch_heads_loss, launch_losses, launch_residual
from .layers import (
    launch_first_gradient,
    launch_forward,
    launch_input_gradient,
    launch_weight_gradient,
)
from .on_chip import Weights, launch_network_forward, launch_network_step, scratch_size
from .optim import launch_reduce
from .plan import Network, Plan
from .segments import DTYPES, Segment, Table


@lru_cache(maxsize=64)
def _table(segments: tuple[Segment, ...], groups: int, device: torch.device) -> Table:
    """Tables are small and never change; making one copies to the device.

    Raises RuntimeError while a CUDA graph is recorded, which such a copy would spoil.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "networks of this shape: expected one call before a CUDA graph is recorded, got the first one inside. "
            "Warm up: call the loss once on a side stream, as PyTorch's recipe for graphs does."
        )
    return Table(segments, groups, device)


def side_by_side(tensors: Mapping[int, Tensor], layers: range) -> Tensor:
    """[L, ...] of layers whose tensors are of one shape and lie at equal distances in one memory."""
    first = tensors[layers[0]]
    distance = tensors[layers[1]].storage_offset() - first.storage_offset() if len(layers) > 1 else 0
    return first.as_strided((len(layers), *first.shape), (distance, *first.stride()))


class Pipeline(Plan):
    """Memory of a training step and the launches over it. Allocates in the constructor, never afterwards.

    Args:
        network: sizes.
        points: P, as every call will have.
        wanted: which parameters need a gradient: weight and bias of each layer in turn.
        want_points: whether the coordinates do.
        device: a CUDA device, or the CPU under the interpreter.
        wave: rows of a wave; None takes WAVE_ELEMENTS' worth.
        values_only: only `values` will be called.
        own_table: for callers that change the table's scales; equal pipelines share one otherwise.

    `table` describes the parameters for optim.py: [G, T] with G = N where the first layer is stacked, else 1, each
    weight and bias in turn. `copies` and `exact_copies` hold the weights as the launches read them: write them with
    optim.launch_copies or launch_adam. `partials` is what optim.launch_reduce turns into gradients.
    """

    def __init__(
        self,
        network: Network,
        points: int,
        wanted: Sequence[bool],
        want_points: bool = False,
        device: torch.device | str = "cuda",
        wave: int | None = None,
        values_only: bool = False,
        own_table: bool = False,
    ) -> None:
        super().__init__(network, points, wanted, want_points, wave, values_only)
        make = Table if own_table else _table
        self.table = make(tuple(self.segments), self.groups, torch.device(device))
        self._allocate(device)

    def _allocate(self, device: torch.device | str) -> None:
        network, sines = self.network, self.layers - 1
        operand = DTYPES[network.precision]

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        # Padding in the copies stays zero: nothing writes it.
        self.copies = torch.zeros(max(self.copy_size, 1), dtype=operand, device=device)
        self.exact_copies = torch.zeros(max(self.exact_size, 1), dtype=torch.float32, device=device)
        self.partials = empty(max(self.partial_size, 1))
        if self.on_chip:
            self.sums = empty(self.chip_splits, self.head_networks, self.columns)
            size = scratch_size(self.programs, sines - 1, self.widths[0], network.precision)
            self.scratch = empty(size, dtype=operand)
            return
        if self.values_only and self.values_on_chip:
            return
        # The first layer's cosine is computed from coordinates where it is needed.
        kept = range(max(self.lowest, 1 if self.first_fused else 0), sines)
        self.h = self._layers(range(sines), device)
        self.c = self._layers(kept, device)
        turns = [i for i in range(self.lowest, sines) if i not in self.joint and not (i == 0 and self.first_gradient)]
        largest = max((math.prod(self._shape(i)) for i in turns), default=0)
        self._dz = [empty(largest, dtype=operand) for _ in turns[:2]]
        self.dz = self._layers(self.joint, device)
        head_width = self.inputs_in_memory(self.layers - 1)
        splits = heads_splits(
            self.rows, self.head_networks, self.columns, head_width, self.head_precision, self.fused_heads
        )
        # Zeros, because coordinates that heads read directly may have fewer blocks of rows.
        self.sums = torch.zeros(splits, self.head_networks, self.columns, device=device)
        self.g = None
        if not self.fused_heads:
            dtype = operand if sines else torch.float32
            self.g = empty(self.head_networks, self.rows, cdiv(self.columns, 16) * 16, dtype=dtype)

    def _shape(self, layer: int) -> tuple[int, int, int]:
        return self.network.stacks[layer], self.rows, self.widths[layer]

    def _layers(self, layers: range, device: torch.device | str) -> dict[int, Tensor]:
        """[stack, rows, H] of each layer; those of one shape lie side by side."""
        operand, shapes = DTYPES[self.network.precision], {self._shape(i) for i in layers}
        if len(shapes) == 1:
            return dict(zip(layers, torch.empty(len(layers), *shapes.pop(), dtype=operand, device=device), strict=True))
        return {i: torch.empty(self._shape(i), dtype=operand, device=device) for i in layers}

    def weight(self, layer: int) -> Tensor:
        """[stack, out, in] as the launches read it; the head's as [networks, columns, in]."""
        s = self.segments[2 * layer]
        flat = self.exact_copies if s.exact else self.copies
        size = self.network.stacks[layer] * s.copy_rows * s.copy_columns
        stack = self.head_networks if layer == self.layers - 1 else self.network.stacks[layer]
        return flat[s.copy : s.copy + size].view(stack, -1, s.copy_columns)

    def weight_for_gradient(self, layer: int) -> Tensor:
        """The same values; in tf32 laid out so that the matrix unit reads them along its reduction."""
        s = self.segments[2 * layer]
        weight = self.weight(layer)
        if s.transposed < 0 or layer == self.layers - 1:
            return weight
        turned = self.copies[s.transposed : s.transposed + weight.numel()]
        return turned.view(weight.shape[0], weight.shape[2], weight.shape[1]).transpose(1, 2)

    def bias(self, layer: int) -> Tensor:
        """[stack, out]"""
        s = self.segments[2 * layer + 1]
        stack = self.head_networks if layer == self.layers - 1 else self.network.stacks[layer]
        return self.exact_copies[s.copy : s.copy + self.network.stacks[layer] * s.copy_rows].view(stack, -1)

    def weights(self) -> Weights:
        """All weights, for the whole-network kernels."""
        return Weights(
            self.weight(0),
            self.bias(0),
            *(self.weight(min(1, self.layers - 1)), self.bias(min(1, self.layers - 1))),
            *(self.weight(self.layers - 1), self.bias(self.layers - 1)),
            self.layers - 2,
            *(self._distance("copy", i) for i in (0, 1)),
        )

    def _distance(self, what: str, parameter: int) -> int:
        """Elements from a hidden layer's weight (0) or bias (1) to the next one's."""
        if self.layers < 4:
            return 0
        first, second = (getattr(self.segments[2 * layer + parameter], what) for layer in (1, 2))
        return int(second) - int(first)

    def _gradients(self, layer: int) -> tuple[Tensor, Tensor]:
        """Partial sums [S, stack, out, in] and [S, stack, out]."""
        weight, bias = self.segments[2 * layer : 2 * layer + 2]
        stack, rows, columns = self.weight(layer).shape
        s = weight.splits
        return (
            self.partials[weight.partial : weight.partial + s * stack * rows * columns].view(s, stack, rows, columns),
            self.partials[bias.partial : bias.partial + s * stack * rows].view(s, stack, rows),
        )

    def parameters(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat buffer [G, T]: weight [stack, out, in] and bias [stack, out] of each layer."""
        views = []
        for i, s in enumerate(self.segments):
            shape = (s.rows,) if i % 2 else (s.rows, s.columns)
            own = flat[:, s.offset : s.offset + s.size].view(self.groups, s.count, *shape)
            views.append(own[:, 0] if s.count == 1 else own[0])  # one of G and count is 1
        return views

    def launch(
        self,
        points: Tensor,  # [P, in] float32
        values: Tensor,  # [N, P, C] float32
        scale: Tensor,  # [N]: 2 * weight / norm of each signal, times loss_scale
        norm: Tensor,  # [N]: what each signal's sum of squares is divided by
        losses: Tensor,  # [N]; overwritten
        bad: Tensor | None = None,  # [G] int32; set where a loss is not finite
        *,
        point_weights: Tensor | None = None,  # [N, P]
        dpoints: Tensor | None = None,  # [P, in]; overwritten, times loss_scale
        gradients: Tensor | None = None,  # [G, T]; overwritten
    ) -> None:
        """Losses and gradients from the copies of the weights. Allocates and waits for nothing.

        `bad` is then also set where a gradient is not finite. Without `gradients` their partial sums are left.

        Raises ValueError for tensors that do not belong together, before anything is launched.
        """
        if self.on_chip:
            self._launch_on_chip(points, values, scale, point_weights)
        for start in range(0, 0 if self.on_chip else self.points, self.rows):
            own = slice(start, min(start + self.rows, self.points))
            weights = None if point_weights is None else point_weights[:, own]
            gradient = None if dpoints is None else dpoints[own]
            self._wave(points[own], values[:, own], scale, weights, gradient, start > 0)
        if gradients is None or bad is None:
            launch_losses(self.sums, norm, losses, bad)
        else:
            launch_reduce(self.table, self.partials, gradients, bad, (self.sums, norm, losses))

    def _launch_on_chip(self, points: Tensor, values: Tensor, scale: Tensor, point_weights: Tensor | None) -> None:
        first, hidden, head = (self._gradients(i) for i in (0, min(1, self.layers - 1), self.layers - 1))
        distances = (self._distance("partial", i) for i in (0, 1))
        gradients = Weights(*first, *hidden, *head, self.layers - 2, *distances)
        launch_network_step(
            points, self.weights(), values, scale, self.sums, gradients, self.scratch, self.programs,
            point_weights=point_weights, precision=self.network.precision,
        )  # fmt: skip

    def values(
        self,
        points: Tensor,  # [P, in] float32
        y: Tensor,  # [networks, P, columns] float32, contiguous; overwritten. See `head_networks` and `columns`
    ) -> None:
        """Values of the networks, without losses: whole networks on chip where they fit, else by layers."""
        if self.values_on_chip:
            launch_network_forward(points, self.weights(), y, precision=self.network.precision)
            return
        head = self.weight(self.layers - 1), self.bias(self.layers - 1)
        for start in range(0, self.points, self.rows):
            own = slice(start, min(start + self.rows, self.points))
            h = self.forward(points[own])
            count = own.stop - start
            h = h[:, :count] if h.ndim == 3 else h
            launch_forward(h, *head, y[:, own], omega=1.0, sine=False, precision=self.head_precision)

    def forward(self, points: Tensor) -> Tensor:  # [rows, in] -> [stack, rows, H] of the last sine layer
        """Sine layers over one wave; cosines are kept where the backward pass needs them."""
        if self.forward_chain:
            return self._chain(points)
        h = points
        for i in range(self.layers - 1):
            shared = h[0] if h.ndim == 3 and h.shape[0] == 1 else h
            launch_forward(
                shared,
                self.weight(i),
                self.bias(i),
                self.h[i],
                cosine=self.c.get(i),
                omega=1.0,
                operand=True,
                precision=self._precision(i),
            )
            h = self.h[i]
        return h

    def _chain(self, points: Tensor) -> Tensor:
        """The same in one launch."""
        hidden = range(1, self.layers - 1)
        cosines = side_by_side(self.c, hidden) if self.c else None
        weights, biases = ({i: one(i) for i in hidden} for one in (self.weight, self.bias))
        launch_forward_chain(
            points, self._first(self.network.stacks[0]), side_by_side(weights, hidden), side_by_side(biases, hidden),
            side_by_side(self.h, range(self.layers - 1)), cosines, precision=self.network.precision,
        )  # fmt: skip
        return self.h[self.layers - 2]

    def _precision(self, layer: int) -> str:
        """Coordinates are never rounded."""
        return "fp32" if layer == 0 and self.network.coordinates > FEW_INPUTS else self.network.precision

    def _wave(
        self,
        points: Tensor,  # [rows or fewer, in]
        values: Tensor,
        scale: Tensor,
        point_weights: Tensor | None,
        dpoints: Tensor | None,
        add: bool,
    ) -> None:
        h = self.forward(points)
        dz = self._heads(h, values, scale, point_weights, dpoints, add)
        if self.gradient_chain:
            weights = side_by_side({i: self.weight_for_gradient(i) for i in self.joint}, self.joint)
            cosines = side_by_side(self.c, self.joint)
            launch_gradient_chain(side_by_side(self.dz, self.joint), weights, cosines, precision=self.network.precision)
            dz = self.dz[1]
        for i in range(1 if self.gradient_chain else self.layers - 2, self.lowest - 1, -1):
            assert dz is not None
            if i not in self.joint:
                self._weight_gradient(i, dz, points, add)
            if i == 1 and self.first_gradient:
                self._first_gradient(dz, points, add)
                break
            if i > self.lowest:
                dz = self._input_gradient(i, dz, points)
        if self.joint:
            self._joint_weight_gradient(add)
        if dpoints is not None and self.layers > 1:
            assert dz is not None
            launch_input_gradient(dz[:, : points.shape[0]], self.weight(0), dpoints[None], precision="fp32")

    def _first(self, networks: int) -> tuple[Tensor, Tensor]:
        """The first layer's weight and bias, shared by stride 0 where there are more networks than first layers."""
        weight, bias = self.weight(0), self.bias(0)
        return weight.expand(networks, -1, -1), bias.expand(networks, -1)

    def _dz_of(self, layer: int) -> Tensor:
        """[stack, rows, H]: kept until all weight gradients are computed, or buffers take turns."""
        if layer in self.joint:
            return self.dz[layer]
        shape = self._shape(layer)
        return self._dz[layer % len(self._dz)][: math.prod(shape)].view(shape)

    def _heads(
        self,
        h: Tensor,
        values: Tensor,
        scale: Tensor,
        point_weights: Tensor | None,
        dpoints: Tensor | None,
        add: bool,
    ) -> Tensor | None:
        """Error sums and head gradients; dz of the last sine layer where the backward pass goes on."""
        layer, last = self.layers - 1, self.layers - 2
        dz = self._dz_of(last) if self.lowest <= last and last >= 0 else None
        dw, db = self._gradients(layer) if any(self.wanted[-2:]) else (None, None)
        weight, bias = self.weight(layer), self.bias(layer)
        precision = self.head_precision
        if self.fused_heads:
            launch_heads_loss(
                h,
                weight,
                bias,
                values,
                scale,
                self.sums,
                point_weights=point_weights,
                cosine=None if dz is None else self.c[last],
                dz=dz,
                dw=dw,
                db=db,
                add=add,
                precision=precision,
            )
            return dz
        assert self.g is not None
        if h.ndim == 2:  # no sine layer: the coordinates themselves
            h = h.expand(self.head_networks, *h.shape)
        g = self.g[:, : h.shape[1]]
        launch_residual(
            h, weight, bias, values, scale, self.sums, g, point_weights=point_weights, add=add, precision=precision
        )
        g = g[:, :, : self.columns]
        if dw is not None:
            launch_weight_gradient(g, h, dw, db, add=add, precision=precision)
        if dz is not None:
            launch_input_gradient(g, weight, dz, self.c[last], operand=True, precision=precision)
        elif dpoints is not None:
            launch_input_gradient(g, weight, dpoints[None], precision="fp32")
        return dz

    def _weight_gradient(self, layer: int, dz: Tensor, points: Tensor, add: bool) -> None:
        if not any(self.wanted[2 * layer : 2 * layer + 2]):
            return
        x = self.h[layer - 1] if layer else points
        x = x[0] if x.ndim == 3 and x.shape[0] == 1 else x
        dw, db = self._gradients(layer)
        launch_weight_gradient(dz, x, dw, db, add=add, precision=self._precision(layer))

    def _joint_weight_gradient(self, add: bool) -> None:
        """Those of all hidden layers at once."""
        weights, biases = ({i: self._gradients(i)[kind] for i in self.joint} for kind in (0, 1))
        below = range(self.joint[0] - 1, self.joint[-1])
        launch_weight_gradient(
            side_by_side(self.dz, self.joint), side_by_side(self.h, below), side_by_side(weights, self.joint),
            side_by_side(biases, self.joint), add=add, precision=self.network.precision,
        )  # fmt: skip

    def _first_gradient(self, dz: Tensor, points: Tensor, add: bool) -> None:
        launch_first_gradient(
            dz,
            self.weight_for_gradient(1),
            points,
            *self._gradients(0),
            first=self._first(self.network.stacks[0]),
            add=add,
            precision=self.network.precision,
        )

    def _input_gradient(self, layer: int, dz: Tensor, points: Tensor) -> Tensor:
        fused = layer == 1 and self.first_fused
        out = self._dz_of(layer - 1)
        launch_input_gradient(
            dz,
            self.weight_for_gradient(layer),
            out,
            None if fused else self.c[layer - 1],
            first=self._first(self.network.stacks[0]) if fused else None,
            x=points if fused else None,
            operand=True,
            precision=self.network.precision,
        )
        return out

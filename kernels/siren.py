"""A training step of sine networks, layer by layer over waves of points: what is launched when, on what memory.

A wave is as many points as keep its activations within WAVE_ELEMENTS a layer, so memory does not grow with the image.
All sizes are padded: rows to whole tiles, widths so that rows begin at 16 bytes. Weights in the padding are zero,
hence sines, gradients and their products there are exactly zero, and no kernel has to know.

    coordinates --first layer, computed where it is needed--> h1 --W2--> h2, c2 --W3--> h3, c3 ... --heads--> loss
    dz of a layer = (dz of the next @ W) * c, stored once; dW = dz^T h as partial sums that optim.launch_reduce adds up

Stored per wave and hidden layer: h = sin(z) and c = cos(z), both as operands (2 bytes in half precision), dz in two
buffers that take turns. The cosine is stored rather than z: as many bytes, no second range reduction, and in half
precision an error of 2^-12 where z of size 8 would have 2^-8.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .checks import cdiv
from .configs import FEW_INPUTS
from .heads import fuses, heads_splits, launch_heads_loss, launch_losses, launch_residual
from .layers import (
    first_gradient_splits,
    launch_first_gradient,
    launch_forward,
    launch_input_gradient,
    launch_weight_gradient,
    splits_for,
)
from .on_chip import (
    Weights,
    fits_on_chip,
    launch_network_forward,
    launch_network_step,
    scratch_size,
    step_programs,
)
from .segments import DTYPES, Segment, Table

WAVE_ELEMENTS = 2**25
"""Activations of a layer in a wave: 64 MiB in half precision; 131,072 points of a network 256 wide."""

ROWS = 128
"""Rows of a wave are a multiple of this: no tile of the table reaches over the end."""


@dataclass(frozen=True)
class Network:
    """Sizes of a stack of sine networks of L linear layers."""

    coordinates: int
    widths: tuple[int, ...]  # outputs of each layer; the head's channels last
    stacks: tuple[int, ...]  # matrices of each layer: 1 (shared by all signals), from some layer on one per signal
    omegas: tuple[float, ...]  # of the L - 1 sine layers
    precision: str = "fp32"

    def inputs(self, layer: int) -> int:
        """What a layer is given per point."""
        return self.widths[layer - 1] if layer else self.coordinates


def padded(width: int) -> int:
    """Width in memory: rows begin at 16 bytes, tiles of wide layers are full."""
    return cdiv(width, 16) * 16 if width <= 64 else cdiv(width, 64) * 64


class Pipeline:
    """Memory of a training step and the launches over it. Allocates in the constructor, never afterwards.

    Args:
        network: sizes.
        points: P, as every call will have.
        wanted: which parameters need a gradient: weight and bias of each layer in turn.
        want_points: whether the coordinates do.
        device: a CUDA device, or the CPU under the interpreter.
        wave: rows of a wave; None takes WAVE_ELEMENTS' worth.
        values_only: only `values` will be called.

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
    ) -> None:
        self.network, self.points, self.wanted, self.want_points = network, points, tuple(wanted), want_points
        self.layers = len(network.widths)
        self.signals = network.stacks[-1]
        self.groups = network.stacks[0]
        sines = self.layers - 1
        self.first_fused = sines >= 2 and network.coordinates <= FEW_INPUTS
        self.widths = [padded(w) for w in network.widths[:-1]]
        trained = [i for i in range(self.layers) if wanted[2 * i] or wanted[2 * i + 1]]
        self.lowest = 0 if want_points else min(trained, default=self.layers)
        """The backward pass ends here: what lies before is frozen and costs its forward pass only."""
        self.first_gradient = self.first_fused and self.lowest == 0 and not want_points
        """Whether the first layer's gradients come straight from the second layer's dz."""
        self.on_chip = wave is None and self._fits_on_chip()
        """Whether a step is one launch (network.py) instead of a few per layer."""
        self.rows = self._wave_rows(wave)
        # Heads on shared features are one network of all their columns.
        self.head_networks = network.stacks[-2] if sines else 1
        if sines and network.stacks[-2] == network.stacks[-1]:
            self.head_networks = network.stacks[-1]
        self.columns = network.stacks[-1] * network.widths[-1] // self.head_networks
        head_width = self.widths[-1] if sines else network.coordinates
        self.head_precision = network.precision if sines else "fp32"
        self.programs = 1
        self.chip_splits = 1
        if self.on_chip:
            sizes = network.stacks[0], head_width, network.precision
            self.chip_splits, self.programs = step_programs(points, *sizes)
        self.fused_heads = sines > 0 and fuses(self.columns, head_width, network.precision)
        self.values_on_chip = self._same_width() and fits_on_chip(
            "network_forward", network.coordinates, head_width, self.columns, network.precision
        )
        self.values_only = values_only
        self.segments = self._segments(trained)
        self.table = _table(tuple(self.segments), self.groups, torch.device(device))
        self._allocate(device)

    def _same_width(self) -> bool:
        """Whether whole-network kernels know the shape: equally wide sine layers, and as many networks in each."""
        return self.layers > 1 and len({*self.widths}) == 1 and len({*self.network.stacks[:-1]}) == 1

    def _fits_on_chip(self) -> bool:
        network = self.network
        if not self._same_width() or self.want_points or not all(self.wanted):
            return False
        columns = network.stacks[-1] * network.widths[-1] // network.stacks[0]
        return fits_on_chip("network_step", network.coordinates, self.widths[0], columns, network.precision)

    def _wave_rows(self, wave: int | None) -> int:
        elements = max((w * n for w, n in zip(self.widths, self.network.stacks, strict=False)), default=1)
        most = wave or max(ROWS, WAVE_ELEMENTS // elements)
        return cdiv(min(max(self.points, 1), most), ROWS) * ROWS

    def _splits(self, layer: int) -> int:
        """Partial sums of a layer's weight gradient."""
        network = self.network
        if self.on_chip:
            return self.chip_splits
        if layer == self.layers - 1:
            if self.fused_heads:
                return heads_splits(self.rows, self.head_networks, self.columns, self._inputs(layer), network.precision)
            args = (self.rows, self.columns, self._inputs(layer), self.head_networks)
            return splits_for(*args, self.head_precision)
        if layer == 0 and self.first_gradient:
            return first_gradient_splits(self.rows, max(self.widths[:2]), network.precision)
        precision = network.precision if layer or network.coordinates <= FEW_INPUTS else "fp32"
        return splits_for(self.rows, self.widths[layer], self._inputs(layer), network.stacks[layer], precision)

    def _inputs(self, layer: int) -> int:
        """A layer's inputs in memory."""
        return self.widths[layer - 1] if layer else self.network.coordinates

    def _segments(self, trained: Sequence[int]) -> list[Segment]:
        """Where each weight and bias is, in the flat parameters, the partial sums and the copies."""
        network = self.network
        ends = {"offset": 0, "partial": 0, "copies": 0, "exact": 0}

        def place(buffer: str, size: int) -> int:
            start = ends[buffer]
            ends[buffer] += cdiv(size, 16) * 16  # 16 elements: at least 32 bytes
            return start

        self.loss_scale = 2.0 ** round(math.log2(max(self.points * network.widths[-1], 1)))
        """Gradients are computed this much larger, a power of two about the number of residuals, so that they do not
        vanish in half precision."""
        segments = []
        for layer, (width, stack) in enumerate(zip(network.widths, network.stacks, strict=True)):
            head = layer == self.layers - 1
            omega = 1.0 if head else network.omegas[layer]
            rows = width if head else self.widths[layer]  # heads lie side by side, without padding
            splits = self._splits(layer) if layer in trained else 1
            exact = layer == 0  # coordinates are no operands of a matrix unit
            for is_bias, columns, memory in ((False, network.inputs(layer), self._inputs(layer)), (True, 1, 1)):
                index = 2 * layer + is_bias
                size = stack * rows * memory
                turned = network.precision == "tf32" and not exact and not is_bias
                segments.append(
                    Segment(
                        count=stack // self.groups,
                        rows=width,
                        columns=columns,
                        offset=place("offset", stack // self.groups * width * columns),
                        partial=place("partial", splits * size) if layer in trained else -1,
                        partial_rows=rows,
                        partial_columns=memory,
                        splits=splits,
                        copy=place("exact" if exact or is_bias else "copies", size),
                        transposed=place("copies", size) if turned else -1,
                        copy_rows=rows,
                        copy_columns=memory,
                        factor=omega / self.loss_scale,
                        omega=omega,
                        exact=exact or is_bias,
                        trained=self.wanted[index],
                    )
                )
        self.partial_size = ends["partial"]
        self.copy_size, self.exact_size = ends["copies"], ends["exact"]
        self.length = cdiv(ends["offset"], 4) * 4
        """T: parameters of a group in the flat buffers."""
        return segments

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
        stored = range(1 if self.first_fused else 0, sines)
        shapes = {i: (network.stacks[i], self.rows, self.widths[i]) for i in range(sines)}
        self.h = {i: empty(*shapes[i], dtype=operand) for i in stored}
        self.c = {i: empty(*shapes[i], dtype=operand) for i in stored if i >= self.lowest}
        largest = max((math.prod(shapes[i]) for i in range(self.lowest, sines)), default=0)
        self._dz = [empty(largest, dtype=operand) for _ in range(min(2, sines - self.lowest))]
        head_width = self._inputs(self.layers - 1)
        splits = heads_splits(
            self.rows, self.head_networks, self.columns, head_width, self.head_precision, self.fused_heads
        )
        # Zeros, because a last wave, or coordinates that heads read directly, may have fewer blocks of rows.
        self.sums = torch.zeros(splits, self.head_networks, self.columns, device=device)
        self.g = None
        if not self.fused_heads:
            dtype = operand if sines else torch.float32
            self.g = empty(self.head_networks, self.rows, cdiv(self.columns, 16) * 16, dtype=dtype)

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
    ) -> None:
        """Losses, and partial sums of the gradients, from the copies of the weights. Allocates and waits for nothing.

        Raises ValueError for tensors that do not belong together, before anything is launched.
        """
        if self.on_chip:
            self._launch_on_chip(points, values, scale, point_weights)
        for start in range(0, 0 if self.on_chip else self.points, self.rows):
            own = slice(start, min(start + self.rows, self.points))
            weights = None if point_weights is None else point_weights[:, own]
            gradient = None if dpoints is None else dpoints[own]
            self._wave(points[own], values[:, own], scale, weights, gradient, start > 0)
        launch_losses(self.sums, norm, losses, bad)

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
        h = points
        for i in range(self.layers - 1):
            if i == 0 and self.first_fused:
                continue
            shared = h[0] if h.ndim == 3 and h.shape[0] == 1 else h
            launch_forward(
                shared,
                self.weight(i),
                self.bias(i),
                self.h[i],
                cosine=self.c.get(i),
                omega=1.0,
                first=self._first(self.network.stacks[1]) if i == 1 and self.first_fused else None,
                operand=True,
                precision=self._precision(i),
            )
            h = self.h[i]
        return h

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
        for i in range(self.layers - 2, self.lowest - 1, -1):
            assert dz is not None
            self._weight_gradient(i, dz, points, add)
            if i == 1 and self.first_gradient:
                self._first_gradient(dz, points, add)
                break
            if i > self.lowest:
                dz = self._input_gradient(i, dz, points)
        if dpoints is not None and self.layers > 1:
            assert dz is not None
            launch_input_gradient(dz[:, : points.shape[0]], self.weight(0), dpoints[None], precision="fp32")

    def _first(self, networks: int) -> tuple[Tensor, Tensor]:
        """The first layer's weight and bias, shared by stride 0 where there are more networks than first layers."""
        weight, bias = self.weight(0), self.bias(0)
        return weight.expand(networks, -1, -1), bias.expand(networks, -1)

    def _dz_of(self, layer: int) -> Tensor:
        """[stack, rows, H]: buffers take turns."""
        shape = (self.network.stacks[layer], self.rows, self.widths[layer])
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
        first = self._first(self.network.stacks[1]) if layer == 1 and self.first_fused else None
        x = points if layer == 0 or first is not None else self.h[layer - 1]
        x = x[0] if x.ndim == 3 and x.shape[0] == 1 else x
        dw, db = self._gradients(layer)
        launch_weight_gradient(dz, x, dw, db, first=first, add=add, precision=self._precision(layer))

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


@lru_cache(maxsize=64)
def _table(segments: tuple[Segment, ...], groups: int, device: torch.device) -> Table:
    """Tables are small and never change; making one copies to the device."""
    return Table(segments, groups, device)


def network_of(coordinates: int, parameters: Sequence[Tensor], omegas: Sequence[float], precision: str) -> Network:
    """The sizes of parameters as models have them: [out, in], [out] of each layer; from some layer on stacked."""
    weights = parameters[::2]
    return Network(
        coordinates,
        tuple(w.shape[-2] for w in weights),
        tuple(w.shape[0] if w.ndim == 3 else 1 for w in weights),
        tuple(omegas),
        precision,
    )

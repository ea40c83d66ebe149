"""What a training step of sine networks needs: sizes, splits and places, decided before any memory is taken."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .chains import can_chain
from .checks import cdiv
from .configs import FEW_INPUTS
from .heads import fuses, heads_splits
from .layers import first_gradient_splits, splits_for
from .on_chip import fits_on_chip, step_programs
from .segments import Segment

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


class Plan:
    """Arguments as of siren.Pipeline, which adds the memory."""

    def __init__(
        self,
        network: Network,
        points: int,
        wanted: Sequence[bool],
        want_points: bool = False,
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
        self.joint = self._joint_layers()
        """Hidden layers whose weight gradients are one launch; none where shapes differ."""
        self.rows = self._wave_rows(wave)
        alike = sines >= 2 and self._same_width()
        few, shape = network.coordinates <= FEW_INPUTS, (self.rows, self.widths[0] if sines else 0, self.groups)
        cosines = self.lowest <= 1 or self.lowest >= sines  # of all hidden layers, or of none
        self.forward_chain = alike and few and cosines and can_chain("forward", *shape, network.precision)
        """Whether all sine layers are one launch."""
        self.gradient_chain = bool(self.joint) and can_chain("input_gradient", *shape, network.precision)
        """Whether the way back through the hidden layers is one launch."""
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

    def _same_width(self) -> bool:
        """Whether whole-network kernels know the shape: equally wide sine layers, and as many networks in each."""
        return self.layers > 1 and len({*self.widths}) == 1 and len({*self.network.stacks[:-1]}) == 1

    def _fits_on_chip(self) -> bool:
        network = self.network
        if not self._same_width() or self.want_points or not all(self.wanted):
            return False
        columns = network.stacks[-1] * network.widths[-1] // network.stacks[0]
        return fits_on_chip("network_step", network.coordinates, self.widths[0], columns, network.precision)

    def _joint_layers(self) -> range:
        sines = self.layers - 1
        alike = (
            sines >= 3 and self.lowest <= 1 and len({*self.widths}) == 1 and len({*self.network.stacks[:sines]}) == 1
        )
        return range(1, sines) if alike and not self.on_chip and all(self.wanted[2:-2]) else range(0)

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
                return heads_splits(
                    self.rows, self.head_networks, self.columns, self.inputs_in_memory(layer), network.precision
                )
            args = (self.rows, self.columns, self.inputs_in_memory(layer), self.head_networks)
            return splits_for(*args, self.head_precision)
        if layer == 0 and self.first_gradient:
            return first_gradient_splits(self.rows, max(self.widths[:2]), network.precision)
        precision = network.precision if layer or network.coordinates <= FEW_INPUTS else "fp32"
        stack = network.stacks[layer] * (len(self.joint) if layer in self.joint else 1)
        return splits_for(self.rows, self.widths[layer], self.inputs_in_memory(layer), stack, precision)

    def inputs_in_memory(self, layer: int) -> int:
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
            for is_bias, columns, memory in (
                (False, network.inputs(layer), self.inputs_in_memory(layer)),
                (True, 1, 1),
            ):
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

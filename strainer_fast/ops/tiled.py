"""Forward, loss and backward of sine networks in one sweep over tiles of points, in PyTorch's own calls.

Full-batch autograd writes and re-reads every activation of every point. Here a tile of points goes all the way: sine
layers forward, residual, backward chain, weight gradients added up; its buffers then serve the next tile. What a step
needs beyond its gradients is one tile's buffers, whatever the number of points.

Per element of a hidden layer, besides the three products, a sweep does: sin, cos in place of z, one multiplication and
one sum. omega is folded into weights and biases once per sweep: z = x (omega W)^T + omega b.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ELEMENTS = 2**18
"""Activations of one layer in a tile: 1 MiB in float32, which a core's cache holds in part and two share. How it was
chosen: docs/one-pass.md."""

MIN_TILE = 64
ALIGN = 16
"""Rows of a tile come in whole vectors."""


@dataclass(frozen=True)
class Swept:
    """What a sweep leaves; gradients are those of sum_n signal_weights[n] * losses[n], None where not wanted."""

    losses: Tensor  # [N], MSE of each signal
    gradients: list[Tensor | None]  # shaped as the parameters
    points: Tensor | None  # [P, in]


def sweep(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    parameters: Sequence[Tensor],  # [out, in], [out] of each layer; from some layer on [N, out, in], [N, out]
    omegas: Sequence[float],  # L - 1
    wanted: Sequence[bool],  # which parameters need a gradient
    want_points: bool = False,
    signal_weights: Tensor | None = None,  # [N]
    point_weights: Tensor | None = None,  # [P] or [N, P]
    tile: int | None = None,
) -> Swept:
    """Losses of N signals and the gradients of their weighted sum.

    A signal's loss is its squared error averaged over points and channels; with point weights, the weighted average.
    Plain layers are shared by all signals, stacked ones belong to one each. `tile` is the number of points at once;
    None takes TILE_ELEMENTS' worth.
    """
    num_signals, num_points, _ = values.shape
    gradients, point_gradient = empty_gradients(points, parameters, wanted, want_points)
    norm, scale = normalisation(values, signal_weights, point_weights)
    total = torch.zeros_like(norm)

    independent = parameters[0].ndim == 3
    width = max(p.shape[-2] for p in parameters[::2])
    # Independent networks go through the points a group at a time, so that a group's tile fits the cache.
    group = max(1, TILE_ELEMENTS // (width * max(num_points, 1))) if independent else max(num_signals, 1)
    for first in range(0, num_signals, group):
        own = slice(first, first + group)
        pick = own if independent else slice(None)
        layers = _layers([p[pick] for p in parameters], [None if g is None else g[pick] for g in gradients], omegas)
        stack = max(layer.stack for layer in layers)
        rows = tile or _balanced_tile(num_points, width * stack)
        weighting = point_weights if point_weights is None or point_weights.ndim == 1 else point_weights[own]
        _sweep_group(layers, points, values[own], weighting, scale[own], total[own], point_gradient, rows)
    for gradient, omega in zip(gradients, [o for o in omegas for _ in range(2)], strict=False):
        if gradient is not None:
            gradient.mul_(omega)
    return Swept((total / norm).to(values.dtype), gradients, point_gradient)


def empty_gradients(
    points: Tensor, parameters: Sequence[Tensor], wanted: Sequence[bool], want_points: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """Zeros for each wanted gradient of the parameters, and for that of the points."""
    # new_zeros, not zeros_like: gradients are contiguous whatever the parameters are.
    gradients = [p.new_zeros(p.shape) if w else None for p, w in zip(parameters, wanted, strict=True)]
    return gradients, points.new_zeros(points.shape) if want_points else None


def normalisation(
    values: Tensor,  # [N, P, C]
    signal_weights: Tensor | None,  # [N]
    point_weights: Tensor | None,  # [P] or [N, P]
) -> tuple[Tensor, Tensor]:  # [N] float64, [N]
    """(what a signal's sum of squares is divided by, what makes its residuals the gradient of the weighted sum)"""
    num_signals, num_points, channels = values.shape
    if point_weights is None:
        norm = torch.full((num_signals,), num_points * channels, dtype=torch.float64, device=values.device)
    else:
        norm = (point_weights.double().sum(-1) * channels).expand(num_signals)
    scale = 2 / norm if signal_weights is None else 2 * signal_weights.double() / norm
    return norm, scale.to(values.dtype)


def _balanced_tile(num_points: int, elements_per_point: int) -> int:
    """As many points as TILE_ELEMENTS allows, evened out: a short last tile costs as many calls as a full one."""
    most = max(MIN_TILE, TILE_ELEMENTS // elements_per_point)
    tiles = max(1, -(-num_points // most))
    return max(ALIGN, -(-num_points // (tiles * ALIGN)) * ALIGN)


class _Layer:
    """A layer with omega folded in, plain or stacked, and where its gradients are added up."""

    def __init__(
        self, weight: Tensor, bias: Tensor, omega: float | None, dweight: Tensor | None, dbias: Tensor | None
    ) -> None:
        self.weight = weight if omega is None else weight * omega
        self.bias = bias if omega is None else bias * omega
        self.dweight, self.dbias = dweight, dbias
        self.stacked = weight.ndim == 3
        self.stack = weight.shape[0] if self.stacked else 1
        self.has_gradient = dweight is not None or dbias is not None

    def shape(self, rows: int) -> tuple[int, ...]:
        """Of its output for a tile of `rows` points."""
        return (*self.weight.shape[:-2], rows, self.weight.shape[-2])

    def product(self, x: Tensor, out: Tensor) -> Tensor:
        """x W^T + b"""
        if not self.stacked:
            return torch.addmm(self.bias, x, self.weight.t(), out=out)
        return torch.baddbmm(self.bias.unsqueeze(1), self._per_network(x), self.weight.transpose(1, 2), out=out)

    def accumulate(self, dz: Tensor, x: Tensor, ones: Tensor) -> None:
        """Add this tile's share to the gradients of weight and bias."""
        if self.dweight is not None:
            if self.stacked:
                self.dweight.baddbmm_(dz.transpose(1, 2), self._per_network(x))
            else:
                self.dweight.addmm_(dz.t(), x)
        if self.dbias is not None:
            if self.stacked:
                self.dbias.add_(dz.sum(1))
            else:
                self.dbias.addmv_(dz.t(), ones)

    def input_gradient(self, dz: Tensor, out: Tensor, stacked_input: bool) -> Tensor:
        """dz W, summed over the networks where they share their input."""
        if not self.stacked:
            return torch.mm(dz, self.weight, out=out)
        each = torch.bmm(dz, self.weight, out=out)
        return each if stacked_input else each.sum(0)

    def _per_network(self, x: Tensor) -> Tensor:
        return x if x.ndim == 3 else x.expand(self.stack, *x.shape)


def _layers(parameters: Sequence[Tensor], gradients: Sequence[Tensor | None], omegas: Sequence[float]) -> list[_Layer]:
    """Layers in order; a stack of one becomes a plain network, heads on shared features one wide product."""
    layers: list[_Layer] = []
    for i in range(0, len(parameters), 2):
        weight, bias, dweight, dbias = parameters[i], parameters[i + 1], gradients[i], gradients[i + 1]
        is_head = i + 2 == len(parameters)
        if weight.ndim == 3 and (weight.shape[0] == 1 or (is_head and not (layers and layers[-1].stacked))):
            flat = weight.shape[0] * weight.shape[1]
            weight, bias = weight.reshape(flat, -1), bias.reshape(flat)
            dweight = None if dweight is None else dweight.view(flat, -1)
            dbias = None if dbias is None else dbias.view(flat)
        layers.append(_Layer(weight, bias, None if is_head else omegas[i // 2], dweight, dbias))
    return layers


class _Scratch:
    """Memory of one tile, seen in the shape of the tile at hand."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.flat = torch.empty(math.prod(shape), dtype=like.dtype, device=like.device)

    def view(self, shape: tuple[int, ...]) -> Tensor:
        """The first elements, contiguous."""
        return self.flat[: math.prod(shape)].view(shape)


def _sweep_group(
    layers: Sequence[_Layer],
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    point_weights: Tensor | None,  # [P] or [N, P]
    scale: Tensor,  # [N]
    total: Tensor,  # [N] float64; sums of squares are added
    point_gradient: Tensor | None,  # [P, in]; added to
    tile: int,
) -> None:
    """All tiles of one group of signals; gradients are added to those of the layers."""
    num_points = points.shape[0]
    tile = min(tile, max(num_points, 1))
    *hidden, head = layers
    trained = [i for i, layer in enumerate(layers) if layer.has_gradient]
    # The backward pass ends at the first layer that needs it: what lies before is frozen and costs a sine only.
    lowest = 0 if point_gradient is not None else min(trained, default=len(layers))
    sines = [_Scratch(layer.shape(tile), points) for layer in hidden]
    cosines = [_Scratch(layer.shape(tile), points) if i >= lowest else None for i, layer in enumerate(hidden)]
    output = _Scratch(head.shape(tile), points)
    widest = max((layer.stack * tile * layer.weight.shape[-1] for layer in layers[lowest:]), default=0)
    incoming = _Scratch((widest,), points)
    ones = torch.ones(tile, dtype=points.dtype, device=points.device)

    for start in range(0, num_points, tile):
        inputs = [points[start : start + tile]]
        rows = inputs[0].shape[0]
        slopes: list[Tensor] = []
        for layer, sine, cosine in zip(hidden, sines, cosines, strict=True):
            z = layer.product(inputs[-1], (cosine or sine).view(layer.shape(rows)))
            inputs.append(torch.sin(z, out=sine.view(layer.shape(rows))))
            slopes.append(z.cos_() if cosine is not None else z)
        dz = head.product(inputs[-1], output.view(head.shape(rows)))
        residual = dz if head.stacked else dz.view(rows, values.shape[0], -1).transpose(0, 1)  # [N, rows, C]
        residual.sub_(values[:, start : start + rows])
        if point_weights is None:
            total.add_(residual.square().sum((1, 2), dtype=torch.float64))
        else:
            weight = point_weights[..., start : start + rows].unsqueeze(-1)
            total.add_((residual.square() * weight).sum((1, 2), dtype=torch.float64))
            residual.mul_(weight)
        if lowest == len(layers):
            continue
        residual.mul_(scale.view(-1, 1, 1))
        for i in range(len(layers) - 1, lowest - 1, -1):
            layer, x = layers[i], inputs[i]
            layer.accumulate(dz, x, ones[:rows])
            if i > lowest or point_gradient is not None:
                out = incoming.view((*dz.shape[:-1], layer.weight.shape[-1]))
                dx = layer.input_gradient(dz, out, stacked_input=x.ndim == 3)
                if i > 0:
                    dz = slopes[i - 1].mul_(dx)
                elif point_gradient is not None:
                    point_gradient[start : start + rows].add_(dx)

"""Mean squared errors of sine networks with their gradients, in one pass over the points.

The losses here are autograd.Functions whose forward already holds every gradient that is needed and whose backward only
scales them: any optimiser and training loop can use them, and no activation outlives its tile. They can be
differentiated once. For second derivatives use the layers (strainer_fast.nn) or implementation="torch".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from strainer_fast import reference
from strainer_fast._checks import Omega, bad_input, check_count, omega_per_layer
from strainer_fast.ops import native, tiled, triton
from strainer_fast.ops.dispatch import check_precision, choose


def siren_mse(
    points: Tensor,  # [P, in]
    values: Tensor,  # [P, C]
    weights: Sequence[Tensor],  # L of [out, in]
    biases: Sequence[Tensor | None],  # L of [out]
    omega: Omega = 30.0,
    *,
    point_weights: Tensor | None = None,  # [P]
    implementation: str = "auto",
    precision: str = "fp32",
    tile: int | None = None,
) -> Tensor:  # []
    """Mean squared error of a SIREN, with gradients from the same pass.

    Args:
        points: coordinates; may require a gradient.
        values: targets, no gradient.
        weights, biases: of the L linear layers; None for a layer without bias.
        omega: a number or one per sine layer.
        point_weights: not negative; the loss is then the weighted average over points (a mask has zeros and ones).
        implementation: "triton" (GPU), "native" (C++, float32), "tiled" (PyTorch's calls), "torch" (plain autograd) or
            "auto".
        precision: what operands of products are rounded to, sums being float32: "fp32", or with the Triton kernels
            "tf32x3" (three products of tf32 for one, right to 2^-21), "tf32", "fp16" or "bf16". The sine's argument
            is float32 always, gradients are scaled inside so that they do not vanish in half precision, and come out as
            float32.
        tile: points at once; None chooses it.

    Raises:
        InputError for shapes, dtypes or devices that do not belong together.
        RuntimeError when differentiated twice (not with implementation="torch").
    """
    if values.ndim != 2:
        raise bad_input("values", "shape [P, C]", list(values.shape), "Use strainer_mse for several signals.")
    _, losses = _loss(
        points, values.unsqueeze(0), weights, biases, omega, None, point_weights, implementation, precision, tile
    )
    return losses[0]


def strainer_mse(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    weights: Sequence[Tensor],  # K of [out, in], then L - K of [N, out, in]
    biases: Sequence[Tensor | None],
    omega: Omega = 30.0,
    *,
    signal_weights: Tensor | None = None,  # [N]
    point_weights: Tensor | None = None,  # [P] or [N, P]
    implementation: str = "auto",
    precision: str = "fp32",
    tile: int | None = None,
) -> tuple[Tensor, Tensor]:  # [], [N]
    """STRAINER's loss, sum_n w_n MSE_n of N signals with a shared encoder, and beside it each signal's MSE.

    The sum is differentiable; the N errors are not, because the encoder's gradient is summed over signals in the pass.
    `signal_weights` are constants (1 by default). Other arguments and errors as in `siren_mse`.
    """
    total, losses = _loss(
        points, values, weights, biases, omega, signal_weights, point_weights, implementation, precision, tile, True
    )
    return total, losses


def batched_siren_mse(
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    weights: Sequence[Tensor],  # L of [N, out, in]
    biases: Sequence[Tensor | None],  # L of [N, out]
    omega: Omega = 30.0,
    *,
    point_weights: Tensor | None = None,  # [P] or [N, P]
    implementation: str = "auto",
    precision: str = "fp32",
    tile: int | None = None,
) -> Tensor:  # [N]
    """Mean squared errors of N independent SIRENs, each differentiable. Arguments and errors as in `siren_mse`.

    The points are shared; a gradient for them is not available here.
    """
    if any(w.ndim != 3 for w in weights):
        raise bad_input("weights", "shape [N, out, in] each", [list(w.shape) for w in weights], "Use strainer_mse.")
    _, losses = _loss(points, values, weights, biases, omega, None, point_weights, implementation, precision, tile)
    return losses


@torch.no_grad()
def siren_values(
    points: Tensor,  # [P, in]
    weights: Sequence[Tensor],  # L of [out, in], from some layer on perhaps [N, out, in]
    biases: Sequence[Tensor | None],
    omega: Omega = 30.0,
    *,
    implementation: str = "auto",
    precision: str = "fp32",
) -> Tensor:  # [P, C], or [N, P, C] when stacked
    """Values of a network at points, without gradients: for rendering and measuring.

    With the Triton kernels a network that is not too wide (256 units in fp16 on an A100 or H100, 64 in fp32) runs whole
    on chip: activations never reach memory. Arguments and errors as in `siren_mse`.
    """
    omegas = omega_per_layer(omega, len(weights) - 1)
    stacked = bool(weights) and weights[-1].ndim == 3
    shape = (weights[-1].shape[0] if stacked else 1, len(points), weights[-1].shape[-2]) if weights else (1, 0, 0)
    _check(points, points.new_empty(()).expand(shape), weights, biases, None, None)
    chosen = choose(implementation, points.device, points.dtype).name
    check_precision(precision, chosen)
    if chosen not in ("triton", "native"):
        return reference.siren(points, weights, biases, omegas)
    parameters = [p for pair in zip(weights, _filled(weights, biases), strict=True) for p in pair]
    values = (
        triton.values(points, parameters, omegas, precision)
        if chosen == "triton"
        else native.values(points, parameters, omegas)
    )
    return values if stacked else values[0]


def losses_and_gradients(
    implementation: str,
    points: Tensor,  # [P, in]
    values: Tensor,  # [N, P, C]
    parameters: Sequence[Tensor],  # weight and bias of each layer in turn, plain or stacked
    omegas: Sequence[float],
    want_gradients: bool,
    precision: str = "fp32",
) -> tuple[Tensor, list[Tensor]]:  # MSE [N], gradients of their sum
    """What a training loop needs from a step, without autograd's bookkeeping where the implementation has none."""
    if implementation in _ENGINES:
        data = [p.detach() for p in parameters]
        more = {"precision": precision} if implementation == "triton" else {}
        swept = _ENGINES[implementation].sweep(points, values, data, omegas, [want_gradients] * len(data), **more)
        return swept.losses, [g for g in swept.gradients if g is not None]
    with torch.set_grad_enabled(want_gradients):
        losses = reference.mse(reference.siren(points, parameters[::2], parameters[1::2], omegas), values)
    gradients = torch.autograd.grad(losses.sum(), list(parameters)) if want_gradients else ()
    return losses.detach(), list(gradients)


_ENGINES = {"triton": triton, "native": native, "tiled": tiled}
"""Modules whose `sweep` computes losses and gradients together."""


@torch.library.custom_op("strainer_fast::sweep", mutates_args=())
def _sweep(
    engine: str,
    points: Tensor,
    values: Tensor,
    parameters: Sequence[Tensor],
    omegas: Sequence[float],
    wanted: Sequence[bool],
    want_points: bool,
    signal_weights: Tensor | None,
    point_weights: Tensor | None,
    tile: int | None,
    precision: str,
) -> list[Tensor]:
    """[losses, gradient of each wanted parameter ..., gradient of the points if wanted]"""
    arguments = (points, values, parameters, omegas, wanted, want_points, signal_weights, point_weights, tile)
    swept = _ENGINES[engine].sweep(*arguments, **({"precision": precision} if engine == "triton" else {}))
    return [swept.losses, *(g for g in (*swept.gradients, swept.points) if g is not None)]


@_sweep.register_fake
def _(
    engine: str,
    points: Tensor,
    values: Tensor,
    parameters: Sequence[Tensor],
    omegas: Sequence[float],
    wanted: Sequence[bool],
    want_points: bool,
    signal_weights: Tensor | None,
    point_weights: Tensor | None,
    tile: int | None,
    precision: str,
) -> list[Tensor]:
    gradients = [p.new_empty(p.shape) for p, w in zip(parameters, wanted, strict=True) if w]
    return [values.new_empty(values.shape[0]), *gradients, *([points.new_empty(points.shape)] if want_points else [])]


_POINTS = 10
"""Arguments of _OnePass.forward before the points."""


class _OnePass(torch.autograd.Function):
    """Losses whose gradients are known when forward returns."""

    @staticmethod
    def forward(
        engine: str,
        wanted: tuple[bool, ...],
        want_points: bool,
        omegas: tuple[float, ...],
        summed: bool,
        tile: int | None,
        precision: str,
        values: Tensor,
        signal_weights: Tensor | None,
        point_weights: Tensor | None,
        points: Tensor,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        losses, *gradients = _sweep(
            engine,
            points,
            values,
            parameters,
            omegas,
            wanted,
            want_points,
            signal_weights,
            point_weights,
            tile,
            precision,
        )
        if not summed:
            return losses.clone(), losses, *gradients
        total = losses.sum() if signal_weights is None else (signal_weights * losses).sum()
        return total, losses, *gradients

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, ctx.wanted, ctx.want_points, _, ctx.summed, *_ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[_POINTS:], *output[2:])
        ctx.num_parameters = len(inputs) - _POINTS - 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        points, *saved = ctx.saved_tensors
        parameters, gradients = saved[: ctx.num_parameters], saved[ctx.num_parameters :]
        fixed: tuple[None, ...] = (None,) * _POINTS
        if grad is None:
            return (*fixed, None, *[None] * ctx.num_parameters)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            scaled = list(_Scaled.apply(len(gradients), grad, *gradients, points, *parameters))  # type: ignore[no-untyped-call]
        else:
            scaled = _scaled(grad, gradients)
        by_parameter = [scaled.pop(0) if w else None for w in ctx.wanted]
        return (*fixed, scaled.pop(0) if ctx.want_points else None, *by_parameter)


class _Scaled(torch.autograd.Function):
    """Gradients times the incoming gradient; tied to the parameters so that a second derivative raises, not lies."""

    @staticmethod
    def forward(num_gradients: int, grad: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(_scaled(grad, tensors[:num_gradients]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:
        raise RuntimeError(
            "the one-pass loss can be differentiated once: its backward holds finished gradients. For second "
            "derivatives pass implementation='torch', or build the loss from strainer_fast.nn layers."
        )


def _scaled(grad: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """New tensors: each gradient times one factor for all (grad []), or one per network (grad [N])."""
    return [g * (grad if grad.ndim == 0 else grad.view(-1, *[1] * (g.ndim - 1))) for g in gradients]


def _loss(
    points: Tensor,
    values: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    omega: Omega,
    signal_weights: Tensor | None,
    point_weights: Tensor | None,
    implementation: str,
    precision: str,
    tile: int | None,
    summed: bool = False,
) -> tuple[Tensor, Tensor]:
    """(differentiable loss: [] when summed, else [N]; losses [N])"""
    omegas = omega_per_layer(omega, len(weights) - 1)
    _check(points, values, weights, biases, signal_weights, point_weights)
    if tile is not None:
        check_count("tile", tile)
    chosen = choose(implementation, points.device, points.dtype).name
    check_precision(precision, chosen)
    if chosen == "torch":
        prediction = reference.siren(points, weights, biases, omegas)
        if prediction.ndim == 2:
            prediction = prediction.unsqueeze(0)
        losses = _weighted_mse(prediction, values, point_weights)
        total = losses.sum() if signal_weights is None else (signal_weights * losses).sum()
        return (total if summed else losses), (losses.detach() if summed else losses)
    parameters = [p for pair in zip(weights, _filled(weights, biases), strict=True) for p in pair]
    # A custom op cannot see grad mode, so what is needed is decided here.
    enabled = torch.is_grad_enabled()
    wanted = tuple(enabled and p.requires_grad for p in parameters)
    want_points = enabled and points.requires_grad
    if want_points and not summed and values.shape[0] > 1:
        raise bad_input(
            "points", "no gradient: N independent losses share them", "requires_grad", "Use implementation='torch'."
        )
    with reference.no_autocast(points):
        total, losses, *_ = _OnePass.apply(  # type: ignore[no-untyped-call]
            chosen,
            wanted,
            want_points,
            omegas,
            summed,
            tile,
            precision,
            values,
            signal_weights,
            point_weights,
            points,
            *parameters,
        )
    return total, (losses if summed else total)


def _filled(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> list[Tensor]:
    """Biases, zeros where there are none."""
    return [w.new_zeros(w.shape[:-1]) if b is None else b for w, b in zip(weights, biases, strict=True)]


def _weighted_mse(prediction: Tensor, values: Tensor, point_weights: Tensor | None) -> Tensor:
    if point_weights is None:
        return reference.mse(prediction, values)
    squares = (prediction - values).square().mean(dim=-1)  # [N, P]
    return (squares * point_weights).sum(-1) / point_weights.sum(-1)


def _check(
    points: Tensor,
    values: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    signal_weights: Tensor | None,
    point_weights: Tensor | None,
) -> None:
    """Shapes, dtypes and devices, before anything is allocated."""
    if not weights or len(weights) != len(biases):
        raise bad_input("biases", f"one (or None) per weight, {len(weights)} in all", len(biases), "Pair them.")
    if points.ndim != 2 or values.ndim != 3 or values.shape[1] != points.shape[0]:
        got = f"points {list(points.shape)} and values {list(values.shape)}"
        raise bad_input("points and values", "[P, in] and [N, P, C] of the same P", got, "Every signal has all points.")
    num, width, stacked = values.shape[0], points.shape[1], False
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        stacked = stacked or weight.ndim == 3
        lead = [num] if stacked else []
        if [*weight.shape[:-2], weight.shape[-1]] != [*lead, width] or weight.ndim != 2 + len(lead):
            expected = f"shape {[*lead, 'out', width]}"
            raise bad_input(f"weights[{i}]", expected, list(weight.shape), "Plain layers first, then stacked ones.")
        if bias is not None and bias.shape != weight.shape[:-1]:
            raise bad_input(f"biases[{i}]", f"shape {list(weight.shape[:-1])}", list(bias.shape), "Match its weight.")
        width = weight.shape[-2]
    if width != values.shape[2] or (num != 1 and not stacked):
        got = f"{list(weights[-1].shape)} for {num} signals of {values.shape[2]} channels"
        raise bad_input("last layer", "one output per channel, stacked per signal", got, "Match it to the values.")
    for name, tensor, shapes in (
        ("signal_weights", signal_weights, [(num,)]),
        ("point_weights", point_weights, [(points.shape[0],), (num, points.shape[0])]),
    ):
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise bad_input(name, " or ".join(map(str, shapes)), tuple(tensor.shape), "Check its shape.")
        if tensor is not None and tensor.requires_grad:
            raise bad_input(name, "no gradient", "requires_grad", "It is a constant here; detach it.")
    if values.requires_grad:
        raise bad_input("values", "no gradient", "requires_grad", "Targets are constants here; detach them.")
    for name, tensor in [
        ("values", values),
        *((f"weights[{i}]", w) for i, w in enumerate(weights)),
        *((f"biases[{i}]", b) for i, b in enumerate(biases)),
        ("signal_weights", signal_weights),
        ("point_weights", point_weights),
    ]:
        if tensor is not None and (tensor.dtype != points.dtype or tensor.device != points.device):
            got, want = f"{tensor.dtype} on {tensor.device}", f"{points.dtype} on {points.device}, as the points are"
            raise bad_input(name, want, got, "Convert it with .to().")
    if points.dtype not in (torch.float32, torch.float64):
        raise bad_input("points", "float32 or float64", points.dtype, "Convert everything with .float().")

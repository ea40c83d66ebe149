"""The layers' kernels as custom ops: one node each for torch.compile, outputs allocated here, nothing saved.

Shapes: w [N, out, in], b [N, out], x [G, P, in]: one input for each of G groups of networks (G = 1: all share it).
Derivatives and vmap are in layer_autograd.py.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


@torch.library.custom_op("strainer_fast::layer_linear", mutates_args=())
def linear_op(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Tensor:
    """[N, P, out] = x W^T + b, in the dtype of x"""
    from strainer_fast.kernels.layers import launch_forward

    y = x.new_empty(w.shape[0], x.shape[1], w.shape[1])
    with _device_of(x):
        launch_forward(_inputs(x, w.shape[0]), w, b, y, omega=1.0, sine=False, precision=precision)
    return y


@linear_op.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Tensor:
    return x.new_empty(w.shape[0], x.shape[1], w.shape[1])


@torch.library.custom_op("strainer_fast::layer_sine", mutates_args=())
def sine_op(x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str) -> tuple[Tensor, Tensor]:
    """sin(z) and z = omega (x W^T + b), [N, P, out] float32 both; z is empty unless it is to be saved"""
    from strainer_fast.kernels.layers import launch_forward

    y = x.new_empty(w.shape[0], x.shape[1], w.shape[1])
    z = torch.empty_like(y) if save else y.new_empty(0)
    with _device_of(x):
        launch_forward(_inputs(x, w.shape[0]), w, b, y, z if save else None, omega=omega, precision=precision)
    return y, z


@sine_op.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str) -> tuple[Tensor, Tensor]:
    y = x.new_empty(w.shape[0], x.shape[1], w.shape[1])
    return y, torch.empty_like(y) if save else y.new_empty(0)


@torch.library.custom_op("strainer_fast::layer_slope", mutates_args=())
def slope_op(dy: Tensor, z: Tensor, omega: float, precision: str) -> Tensor:
    """omega cos(z) dy: the gradient of x W^T + b, [N, P, out]"""
    from strainer_fast.kernels.layers import launch_slope

    dz = dy.new_empty(z.shape)
    with _device_of(z):
        launch_slope(dy, z.contiguous(), dz, omega=omega, precision=precision)
    return dz


@slope_op.register_fake
def _(dy: Tensor, z: Tensor, omega: float, precision: str) -> Tensor:
    return dy.new_empty(z.shape)


@torch.library.custom_op("strainer_fast::layer_input_gradient", mutates_args=())
def input_gradient_op(dz: Tensor, w: Tensor, groups: int, precision: str) -> Tensor:
    """[G, P, in] = dz W, summed over the networks of each of G groups that share an input"""
    from strainer_fast.kernels.layers import launch_input_gradient

    dx = dz.new_empty(groups, dz.shape[1], w.shape[2])
    with _device_of(dz):
        launch_input_gradient(_rows(dz), w, dx, precision=precision)
    return dx


@input_gradient_op.register_fake
def _(dz: Tensor, w: Tensor, groups: int, precision: str) -> Tensor:
    return dz.new_empty(groups, dz.shape[1], w.shape[2])


@torch.library.custom_op("strainer_fast::layer_weight_gradient", mutates_args=())
def weight_gradient_op(dz: Tensor, x: Tensor, bias: bool, precision: str) -> tuple[Tensor, Tensor]:
    """[N, out, in] = dz^T x and, where there is a bias, [N, out] = the sum of dz over points"""
    from strainer_fast.kernels.layers import launch_weight_gradient, splits_for

    networks, points, outputs = dz.shape
    inputs = x.shape[2]
    with _device_of(dz):
        splits = splits_for(points, outputs, inputs, networks, precision)
        # Partial sums, added up in a fixed order: the same bits every time.
        dw = dz.new_empty(splits, networks, outputs, inputs, dtype=torch.float32)
        db = dz.new_empty(splits, networks, outputs, dtype=torch.float32) if bias else None
        launch_weight_gradient(_rows(dz), _inputs(x, networks), dw, db, precision=precision)
    return dw.sum(0).to(dz.dtype), dz.new_empty(0) if db is None else db.sum(0).to(dz.dtype)


@weight_gradient_op.register_fake
def _(dz: Tensor, x: Tensor, bias: bool, precision: str) -> tuple[Tensor, Tensor]:
    networks, _, outputs = dz.shape
    return dz.new_empty(networks, outputs, x.shape[2]), dz.new_empty((networks, outputs) if bias else 0)


def _device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Within, its device is the current one, which is what Triton launches on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _inputs(x: Tensor, networks: int) -> Tensor:
    """x as the launchers take it: [P, in] when shared by all, else one per network."""
    groups = x.shape[0]
    if groups == 1:
        return x[0]
    return x if groups == networks else x.repeat_interleave(networks // groups, 0)


def _rows(tensor: Tensor) -> Tensor:
    """With a contiguous last axis."""
    # Not .contiguous(), which leaves any stride to an axis of one element.
    return tensor if tensor.stride(-1) == 1 else tensor.clone(memory_format=torch.contiguous_format)

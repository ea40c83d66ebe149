"""What the layers are made of: five operations on Triton kernels, closed under differentiation.

Each operation's derivatives, backward and forward, are written in these same operations and one plain formula (the
sine's second derivative): any order is exact, and reverse mode, forward mode and vmap of torch.func compose. Each is an
autograd.Function over a custom op of layer_ops.py. The compiler, which cannot trace a Function with forward mode and
vmap, gets the op itself, with the same formulas registered.

Shapes: w [N, out, in], b [N, out], x [G, P, in]: one input for each of G groups of networks (G = 1: all share it).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from strainer_fast.ops.layer_ops import input_gradient_op, linear_op, sine_op, slope_op, weight_gradient_op

Dims = tuple[int | None, ...]
"""Which axis of each argument vmap runs over."""


def linear(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Tensor:
    """[N, P, out] = x W^T + b, in the dtype of x."""
    args = (x, w, b, precision)
    y: Tensor = linear_op(*args) if torch.compiler.is_compiling() else Linear.apply(*args)  # type: ignore[no-untyped-call]
    return y


def sine(x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str) -> tuple[Tensor, Tensor]:
    """sin(z) and z = omega (x W^T + b), [N, P, out] float32 both; z is empty unless it is to be saved."""
    args = (x, w, b, omega, save, precision)
    y, z = sine_op(*args) if torch.compiler.is_compiling() else Sine.apply(*args)  # type: ignore[no-untyped-call]
    return y, z


def slope(dy: Tensor, z: Tensor, omega: float, precision: str) -> Tensor:
    """omega cos(z) dy: the gradient of x W^T + b, [N, P, out]."""
    args = (dy, z, omega, precision)
    dz: Tensor = slope_op(*args) if torch.compiler.is_compiling() else Slope.apply(*args)  # type: ignore[no-untyped-call]
    return dz


def input_gradient(dz: Tensor, w: Tensor, groups: int, precision: str) -> Tensor:
    """[G, P, in] = dz W, summed over the networks of each of G groups that share an input."""
    args = (dz, w, groups, precision)
    compiling = torch.compiler.is_compiling()
    dx: Tensor = input_gradient_op(*args) if compiling else InputGradient.apply(*args)  # type: ignore[no-untyped-call]
    return dx


def weight_gradient(dz: Tensor, x: Tensor, bias: bool, precision: str) -> tuple[Tensor, Tensor]:
    """[N, out, in] = dz^T x and [N, out], the sum of dz over points (empty unless there is a bias)."""
    args = (dz, x, bias, precision)
    compiling = torch.compiler.is_compiling()
    dw, db = weight_gradient_op(*args) if compiling else WeightGradient.apply(*args)  # type: ignore[no-untyped-call]
    return dw, db


class Linear(torch.autograd.Function):
    """`linear` with its derivatives."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Any:
        return linear_op(x, w, b, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, w, _, ctx.precision = inputs
        ctx.groups = x.shape[0]
        ctx.save_for_backward(*_needed(ctx, x, w))
        ctx.save_for_forward(x, w)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return *_gradients(ctx, dy, x, w), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        x, w = ctx.saved_tensors
        return _tangent(ctx, x, w, *tangents[:3])

    @staticmethod
    def vmap(info: Any, dims: Dims, x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Any:
        batch = _Batch(info.batch_size, dims, x, w, b)
        return batch.split(linear(batch.x, batch.w, batch.b, precision)), batch.out_dim


class Sine(torch.autograd.Function):
    """`sine` with its derivatives."""

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str) -> Any:
        return sine_op(x, w, b, omega, save, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, w, b, ctx.omega, saved, ctx.precision = inputs
        ctx.groups = x.shape[0]
        ctx.set_materialize_grads(False)
        z = output[1] if saved else None
        if z is None:
            ctx.mark_non_differentiable(output[1])
            ctx.save_for_backward(x, w, b, None)
        else:  # an output: through it a second derivative finds its way back to x, w and b
            ctx.save_for_backward(*_needed(ctx, x, w), None, z)
        ctx.save_for_forward(x, w, b, z)

    @staticmethod
    def _argument(ctx: Any) -> Tensor:
        """z, computed again where nobody could tell that it would be needed (a vmap within a grad)."""
        x, w, b, z = ctx.saved_tensors
        argument: Tensor = ctx.omega * linear(x, w, b, ctx.precision) if z is None else z
        return argument

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, *_ = ctx.saved_tensors
        through_y = None if dy is None else slope(dy, Sine._argument(ctx), ctx.omega, ctx.precision)
        through_z = None if dz is None else ctx.omega * dz
        total = _sum(through_y, through_z)
        found = (None, None, None) if total is None else _gradients(ctx, total, x, w)
        return *found, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor | None]:
        x, w, _, z = ctx.saved_tensors
        inner = _tangent(ctx, x, w, *tangents[:3])
        through = slope(inner, Sine._argument(ctx), ctx.omega, ctx.precision)
        return through, None if z is None else ctx.omega * inner

    @staticmethod
    def vmap(
        info: Any, dims: Dims, x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str
    ) -> Any:
        batch = _Batch(info.batch_size, dims, x, w, b)
        y, z = sine(batch.x, batch.w, batch.b, omega, save, precision)
        return (batch.split(y), batch.split(z) if save else z), (batch.out_dim, batch.out_dim if save else None)


class Slope(torch.autograd.Function):
    """`slope` with its derivatives."""

    @staticmethod
    def forward(dy: Tensor, z: Tensor, omega: float, precision: str) -> Any:
        return slope_op(dy, z, omega, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, z, ctx.omega, ctx.precision = inputs
        ctx.save_for_backward(dy, z)
        ctx.save_for_forward(dy, z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, z = ctx.saved_tensors
        need_dy, need_z, *_ = ctx.needs_input_grad
        to_dy = slope(grad, z, ctx.omega, ctx.precision) if need_dy else None
        return to_dy, -ctx.omega * torch.sin(z) * dy * grad if need_z else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dy, z = ctx.saved_tensors
        dy_t, z_t, *_ = tangents
        through_dy = None if dy_t is None else slope(dy_t, z, ctx.omega, ctx.precision)
        return _sure(_sum(through_dy, None if z_t is None else -ctx.omega * torch.sin(z) * dy * z_t))

    @staticmethod
    def vmap(info: Any, dims: Dims, dy: Tensor, z: Tensor, omega: float, precision: str) -> Any:
        size = info.batch_size
        dz = slope(_merge(dy, dims[0], size), _merge(z, dims[1], size), omega, precision)
        return _split(dz, 0, size), 0


class InputGradient(torch.autograd.Function):
    """`input_gradient` with its derivatives."""

    @staticmethod
    def forward(dz: Tensor, w: Tensor, groups: int, precision: str) -> Any:
        return input_gradient_op(dz, w, groups, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dz, w, ctx.groups, ctx.precision = inputs
        ctx.save_for_backward(dz, w)
        ctx.save_for_forward(dz, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dz, w = ctx.saved_tensors
        need_dz, need_w, *_ = ctx.needs_input_grad
        to_dz = linear(grad, w, None, ctx.precision) if need_dz else None
        return to_dz, weight_gradient(dz, grad, False, ctx.precision)[0] if need_w else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dz, w = ctx.saved_tensors
        dz_t, w_t, *_ = tangents
        through_dz = None if dz_t is None else input_gradient(dz_t, w, ctx.groups, ctx.precision)
        through_w = None if w_t is None else input_gradient(dz, w_t, ctx.groups, ctx.precision)
        return _sure(_sum(through_dz, through_w))

    @staticmethod
    def vmap(info: Any, dims: Dims, dz: Tensor, w: Tensor, groups: int, precision: str) -> Any:
        size = info.batch_size
        if dims[1] is None:
            dx = input_gradient(_merge_points(dz, dims[0]), w, groups, precision)
            return _split(dx, 1, size), 1
        dx = input_gradient(_merge(dz, dims[0], size), _merge(w, dims[1], size), size * groups, precision)
        return _split(dx, 0, size), 0


class WeightGradient(torch.autograd.Function):
    """`weight_gradient` with its derivatives."""

    @staticmethod
    def forward(dz: Tensor, x: Tensor, bias: bool, precision: str) -> Any:
        return weight_gradient_op(dz, x, bias, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        dz, x, ctx.bias, ctx.precision = inputs
        if not ctx.bias:
            ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(dz, x)
        ctx.save_for_forward(dz, x)

    @staticmethod
    def backward(ctx: Any, grad_w: Tensor, grad_b: Tensor | None) -> tuple[Tensor | None, ...]:
        dz, x = ctx.saved_tensors
        need_dz, need_x, *_ = ctx.needs_input_grad
        to_dz = linear(x, grad_w, grad_b if ctx.bias else None, ctx.precision) if need_dz else None
        to_x = input_gradient(dz, grad_w, x.shape[0], ctx.precision) if need_x else None
        return to_dz, to_x, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor | None]:
        dz, x = ctx.saved_tensors
        dz_t, x_t, *_ = tangents
        through_dz, db = (None, None) if dz_t is None else weight_gradient(dz_t, x, ctx.bias, ctx.precision)
        through_x = None if x_t is None else weight_gradient(dz, x_t, False, ctx.precision)[0]
        if not ctx.bias:
            return _sure(_sum(through_dz, through_x)), None
        return _sure(_sum(through_dz, through_x)), dz.new_zeros(dz.shape[::2]) if db is None else db

    @staticmethod
    def vmap(info: Any, dims: Dims, dz: Tensor, x: Tensor, bias: bool, precision: str) -> Any:
        size = info.batch_size
        dw, db = weight_gradient(_merge(dz, dims[0], size), _merge_inputs(x, dims[1], size), bias, precision)
        return (_split(dw, 0, size), _split(db, 0, size) if bias else db), (0, 0 if bias else None)


for _function, _op in (
    (Linear, linear_op),
    (Sine, sine_op),
    (Slope, slope_op),
    (InputGradient, input_gradient_op),
    (WeightGradient, weight_gradient_op),
):
    _op.register_autograd(_function.backward, setup_context=_function.setup_context)
    _op.register_vmap(_function.vmap)


def _needed(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the backward pass reads: a frozen weight's gradient needs no input, a constant input's no weight."""
    need_x, need_w, *_ = ctx.needs_input_grad
    return x if need_w else None, w if need_x else None


def _gradients(ctx: Any, dz: Tensor, x: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, w and b, those that are needed, given the gradient of x W^T + b."""
    need_x, need_w, need_b, *_ = ctx.needs_input_grad
    dx = input_gradient(dz, _sure(w), ctx.groups, ctx.precision) if need_x else None
    if not need_w:
        return dx, None, dz.sum(1).to(dz.dtype) if need_b else None  # autocast widens a sum
    dw, db = weight_gradient(dz, _sure(x), need_b, ctx.precision)
    return dx, dw, db if need_b else None


def _tangent(ctx: Any, x: Tensor, w: Tensor, x_t: Tensor | None, w_t: Tensor | None, b_t: Tensor | None) -> Tensor:
    """Of x W^T + b, from those of x, w and b."""
    through_x = None if x_t is None else linear(x_t, w, None, ctx.precision)
    if w_t is None and b_t is None:
        return _sure(through_x)
    rest = linear(x, torch.zeros_like(w) if w_t is None else w_t, b_t, ctx.precision)
    return _sure(_sum(through_x, rest))


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Of those that are there."""
    there = [t for t in terms if t is not None]
    return None if not there else there[0] if len(there) == 1 else there[0] + there[1]


def _sure(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "saved for the derivative that was asked for"
    return tensor


def _merge(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The batch as more networks: [n, ...] per element to [size * n, ...]."""
    batched = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.flatten(0, 1)


def _merge_inputs(x: Tensor, dim: int | None, size: int) -> Tensor:
    """Likewise, but an input that all share stays one."""
    return x if dim is None and x.shape[0] == 1 else _merge(x, dim, size)


def _merge_points(tensor: Tensor, dim: int | None) -> Tensor:
    """The batch as more points: [n, P, f] per element to [n, size * P, f]."""
    assert dim is not None, "vmap calls a rule only with something to map over"
    return tensor.movedim(dim, 1).flatten(1, 2)


def _split(tensor: Tensor, dim: int, size: int) -> Tensor:
    """The batch as an axis of its own again."""
    shape = tensor.shape
    return tensor.view(*shape[:dim], size, shape[dim] // size, *shape[dim + 1 :])


class _Batch:
    """A batch of products x W^T + b as one: more points of the same networks, or more networks."""

    def __init__(self, size: int, dims: Dims, x: Tensor, w: Tensor, b: Tensor | None) -> None:
        self.size = size
        self.out_dim = 1 if dims[1] is None and dims[2] is None else 0
        if self.out_dim == 1:
            self.x, self.w, self.b = _merge_points(x, dims[0]), w, b
        else:
            self.x, self.w = _merge_inputs(x, dims[0], size), _merge(w, dims[1], size)
            self.b = None if b is None else _merge(b, dims[2], size)

    def split(self, y: Tensor) -> Tensor:
        """The output with the batch as an axis of its own, `out_dim`."""
        return _split(y, self.out_dim, self.size)

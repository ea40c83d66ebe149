"""What the layers are made of: five operations on Triton kernels, closed under differentiation.

Each is a torch.library custom op (one node for torch.compile) with an autograd.Function over it, and each Function's
derivatives, backward and forward, are written in these same operations and one plain formula (the sine's second
derivative): any order of derivative is exact, and reverse, forward mode and vmap of torch.func compose.

Shapes: x [G, P, in] with N a multiple of the number G of inputs (1: shared by all networks), w [N, out, in], b [N, out].
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

Dims = tuple[int | None, ...]
"""Which axis of each argument vmap runs over."""


@torch.library.custom_op("strainer_fast::layer_linear", mutates_args=())
def _linear(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Tensor:
    """[N, P, out] = x W^T + b, in the dtype of x"""
    from strainer_fast.kernels.layers import launch_forward

    y = x.new_empty(w.shape[0], x.shape[1], w.shape[1])
    with _device_of(x):
        launch_forward(_inputs(x, w.shape[0]), w, b, y, omega=1.0, sine=False, precision=precision)
    return y


@_linear.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Tensor:
    return x.new_empty(w.shape[0], x.shape[1], w.shape[1])


@torch.library.custom_op("strainer_fast::layer_sine", mutates_args=())
def _sine(x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str) -> tuple[Tensor, Tensor]:
    """sin(z) and z = omega (x W^T + b), [N, P, out] float32 both; z is empty unless it is to be saved"""
    from strainer_fast.kernels.layers import launch_forward

    y = x.new_empty(w.shape[0], x.shape[1], w.shape[1])
    z = torch.empty_like(y) if save else y.new_empty(0)
    with _device_of(x):
        launch_forward(_inputs(x, w.shape[0]), w, b, y, z if save else None, omega=omega, precision=precision)
    return y, z


@_sine.register_fake
def _(x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str) -> tuple[Tensor, Tensor]:
    y = x.new_empty(w.shape[0], x.shape[1], w.shape[1])
    return y, torch.empty_like(y) if save else y.new_empty(0)


@torch.library.custom_op("strainer_fast::layer_slope", mutates_args=())
def _slope(dy: Tensor, z: Tensor, omega: float, precision: str) -> Tensor:
    """omega cos(z) dy: the gradient of x W^T + b, [N, P, out]"""
    from strainer_fast.kernels.layers import launch_slope

    dz = dy.new_empty(z.shape)
    with _device_of(z):
        launch_slope(dy, z.contiguous(), dz, omega=omega, precision=precision)
    return dz


@_slope.register_fake
def _(dy: Tensor, z: Tensor, omega: float, precision: str) -> Tensor:
    return dy.new_empty(z.shape)


@torch.library.custom_op("strainer_fast::layer_input_gradient", mutates_args=())
def _input_gradient(dz: Tensor, w: Tensor, groups: int, precision: str) -> Tensor:
    """[G, P, in] = dz W, summed over the networks of each of G groups that share an input"""
    from strainer_fast.kernels.layers import launch_input_gradient

    dx = dz.new_empty(groups, dz.shape[1], w.shape[2])
    with _device_of(dz):
        launch_input_gradient(_rows(dz), w, dx, precision=precision)
    return dx


@_input_gradient.register_fake
def _(dz: Tensor, w: Tensor, groups: int, precision: str) -> Tensor:
    return dz.new_empty(groups, dz.shape[1], w.shape[2])


@torch.library.custom_op("strainer_fast::layer_weight_gradient", mutates_args=())
def _weight_gradient(dz: Tensor, x: Tensor, bias: bool, precision: str) -> tuple[Tensor, Tensor]:
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


@_weight_gradient.register_fake
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
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


class _Operation(torch.autograd.Function):
    """A custom op with its derivatives; `vmap` makes of a batch one call with more points or more networks."""

    op: Any

    @classmethod
    def run(cls, *args: Any) -> Any:
        """The operation, differentiable."""
        # The compiler's node is the op with the same formulas registered; it cannot trace a Function's jvp and vmap.
        return cls.op(*args) if torch.compiler.is_compiling() else cls.apply(*args)  # type: ignore[no-untyped-call]


class Linear(_Operation):
    """y [N, P, out] = x W^T + b."""

    op = _linear

    @staticmethod
    def forward(x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> Tensor:
        return _linear(x, w, b, precision)

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
    def vmap(info: Any, dims: Dims, x: Tensor, w: Tensor, b: Tensor | None, precision: str) -> tuple[Tensor, int]:
        batch = _Batch(info.batch_size, dims, x, w, b)
        return batch.split(Linear.run(batch.x, batch.w, batch.b, precision)), batch.out_dim


class Sine(_Operation):
    """y = sin(z) and z = omega (x W^T + b), [N, P, out] float32."""

    op = _sine

    @staticmethod
    def forward(
        x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str
    ) -> tuple[Tensor, Tensor]:
        return _sine(x, w, b, omega, save, precision)

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
        return ctx.omega * Linear.run(x, w, b, ctx.precision) if z is None else z

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
        x, w, *_ = ctx.saved_tensors
        through_y = None if dy is None else Slope.run(dy, Sine._argument(ctx), ctx.omega, ctx.precision)
        through_z = None if dz is None else ctx.omega * dz
        total = _sum(through_y, through_z)
        found = (None, None, None) if total is None else _gradients(ctx, total, x, w)
        return *found, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        x, w, *_ = ctx.saved_tensors
        inner = _tangent(ctx, x, w, *tangents[:3])
        return Slope.run(inner, Sine._argument(ctx), ctx.omega, ctx.precision), ctx.omega * inner

    @staticmethod
    def vmap(
        info: Any, dims: Dims, x: Tensor, w: Tensor, b: Tensor | None, omega: float, save: bool, precision: str
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        batch = _Batch(info.batch_size, dims, x, w, b)
        y, z = Sine.run(batch.x, batch.w, batch.b, omega, save, precision)
        return (batch.split(y), batch.split(z) if save else z), (batch.out_dim, batch.out_dim if save else None)


class Slope(_Operation):
    """omega cos(z) dy, of the shape of z."""

    op = _slope

    @staticmethod
    def forward(dy: Tensor, z: Tensor, omega: float, precision: str) -> Tensor:
        return _slope(dy, z, omega, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dy, z, ctx.omega, ctx.precision = inputs
        ctx.save_for_backward(dy, z)
        ctx.save_for_forward(dy, z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dy, z = ctx.saved_tensors
        need_dy, need_z, *_ = ctx.needs_input_grad
        to_dy = Slope.run(grad, z, ctx.omega, ctx.precision) if need_dy else None
        return to_dy, -ctx.omega * torch.sin(z) * dy * grad if need_z else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dy, z = ctx.saved_tensors
        dy_t, z_t, *_ = tangents
        through_dy = None if dy_t is None else Slope.run(dy_t, z, ctx.omega, ctx.precision)
        return _sure(_sum(through_dy, None if z_t is None else -ctx.omega * torch.sin(z) * dy * z_t))

    @staticmethod
    def vmap(info: Any, dims: Dims, dy: Tensor, z: Tensor, omega: float, precision: str) -> tuple[Tensor, int]:
        size = info.batch_size
        dz = Slope.run(_merge(dy, dims[0], size), _merge(z, dims[1], size), omega, precision)
        return dz.unflatten(0, (size, dz.shape[0] // size)), 0


class InputGradient(_Operation):
    """dx [G, P, in] = dz W, summed over the networks of a group."""

    op = _input_gradient

    @staticmethod
    def forward(dz: Tensor, w: Tensor, groups: int, precision: str) -> Tensor:
        return _input_gradient(dz, w, groups, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        dz, w, ctx.groups, ctx.precision = inputs
        ctx.save_for_backward(dz, w)
        ctx.save_for_forward(dz, w)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dz, w = ctx.saved_tensors
        need_dz, need_w, *_ = ctx.needs_input_grad
        to_dz = Linear.run(grad, w, None, ctx.precision) if need_dz else None
        return to_dz, WeightGradient.run(dz, grad, False, ctx.precision)[0] if need_w else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        dz, w = ctx.saved_tensors
        dz_t, w_t, *_ = tangents
        through_dz = None if dz_t is None else InputGradient.run(dz_t, w, ctx.groups, ctx.precision)
        through_w = None if w_t is None else InputGradient.run(dz, w_t, ctx.groups, ctx.precision)
        return _sure(_sum(through_dz, through_w))

    @staticmethod
    def vmap(info: Any, dims: Dims, dz: Tensor, w: Tensor, groups: int, precision: str) -> tuple[Tensor, int]:
        size = info.batch_size
        if dims[1] is None:
            dx = InputGradient.run(_merge_points(dz, dims[0]), w, groups, precision)
            return dx.unflatten(1, (size, dx.shape[1] // size)), 1
        dx = InputGradient.run(_merge(dz, dims[0], size), _merge(w, dims[1], size), size * groups, precision)
        return dx.unflatten(0, (size, groups)), 0


class WeightGradient(_Operation):
    """dw [N, out, in] = dz^T x and db [N, out], the sum of dz over points (empty unless there is a bias)."""

    op = _weight_gradient

    @staticmethod
    def forward(dz: Tensor, x: Tensor, bias: bool, precision: str) -> tuple[Tensor, Tensor]:
        return _weight_gradient(dz, x, bias, precision)

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
        to_dz = Linear.run(x, grad_w, grad_b if ctx.bias else None, ctx.precision) if need_dz else None
        to_x = InputGradient.run(dz, grad_w, x.shape[0], ctx.precision) if need_x else None
        return to_dz, to_x, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor | None]:
        dz, x = ctx.saved_tensors
        dz_t, x_t, *_ = tangents
        through_dz, db = (None, None) if dz_t is None else WeightGradient.run(dz_t, x, ctx.bias, ctx.precision)
        through_x = None if x_t is None else WeightGradient.run(dz, x_t, False, ctx.precision)[0]
        if not ctx.bias:
            return _sure(_sum(through_dz, through_x)), None
        return _sure(_sum(through_dz, through_x)), dz.new_zeros(dz.shape[::2]) if db is None else db

    @staticmethod
    def vmap(
        info: Any, dims: Dims, dz: Tensor, x: Tensor, bias: bool, precision: str
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int | None]]:
        size = info.batch_size
        dw, db = WeightGradient.run(_merge(dz, dims[0], size), _merge_inputs(x, dims[1], size), bias, precision)
        networks = dw.shape[0] // size
        dw, db = dw.unflatten(0, (size, networks)), db.unflatten(0, (size, networks)) if bias else db
        return (dw, db), (0, 0 if bias else None)


for _operation in (Linear, Sine, Slope, InputGradient, WeightGradient):
    _operation.op.register_autograd(_operation.backward, setup_context=_operation.setup_context)
    _operation.op.register_vmap(_operation.vmap)


def _needed(ctx: Any, x: Tensor, w: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What the backward pass reads: a frozen weight's gradient needs no input, a constant input's no weight."""
    need_x, need_w, *_ = ctx.needs_input_grad
    return x if need_w else None, w if need_x else None


def _gradients(ctx: Any, dz: Tensor, x: Tensor | None, w: Tensor | None) -> tuple[Tensor | None, ...]:
    """Of x, w and b, those that are needed, given the gradient of x W^T + b."""
    need_x, need_w, need_b, *_ = ctx.needs_input_grad
    dx = InputGradient.run(dz, w, ctx.groups, ctx.precision) if need_x else None
    if not need_w:
        return dx, None, dz.sum(1).to(dz.dtype) if need_b else None  # autocast widens a sum
    dw, db = WeightGradient.run(dz, x, need_b, ctx.precision)
    return dx, dw, db if need_b else None


def _tangent(ctx: Any, x: Tensor, w: Tensor, x_t: Tensor | None, w_t: Tensor | None, b_t: Tensor | None) -> Tensor:
    """Of x W^T + b, from those of x, w and b."""
    through_x = None if x_t is None else Linear.run(x_t, w, None, ctx.precision)
    if w_t is None and b_t is None:
        return _sure(through_x)
    rest = Linear.run(x, torch.zeros_like(w) if w_t is None else w_t, b_t, ctx.precision)
    return _sure(_sum(through_x, rest))


def _sum(*terms: Tensor | None) -> Tensor | None:
    """Of those that are there."""
    there: Sequence[Tensor] = [t for t in terms if t is not None]
    return None if not there else there[0] if len(there) == 1 else there[0] + there[1]


def _sure(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a derivative was asked for with nothing to derive from"
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
        return y.unflatten(self.out_dim, (self.size, y.shape[self.out_dim] // self.size))

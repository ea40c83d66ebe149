"""Layers as functions: Triton kernels on a GPU, the plain formulas elsewhere, one signature for both.

They compose like PyTorch's own operations: gradients of any order of x, weights, biases and omega, forward mode, vmap,
torch.func, autocast and torch.compile. Only gradients that are asked for are computed, and a frozen layer keeps nothing
for those that are not. One thing the kernels cannot do is torch.compile of a torch.func transform (or of forward mode):
"auto" is plain PyTorch there, "triton" an error.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from strainer_fast import reference
from strainer_fast._checks import bad_input, check_choice, check_real
from strainer_fast.ops.dispatch import PRECISIONS, choose
from strainer_fast.ops.layer_autograd import linear, sine

LAYER_IMPLEMENTATIONS = ("auto", "triton", "torch")
HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}


def sine_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
    omega: float | Tensor = 30.0,
    *,
    implementation: str = "auto",
    precision: str = "fp32",
) -> Tensor:  # [..., out]
    """y = sin(omega (x W^T + b)), SIREN's layer.

    Args:
        x, weight, bias: floats; lower precisions than float32 are widened first, and autocast does not reach the sine.
        omega: radians per unit; a number, or a tensor of one element, which may require a gradient.
        implementation: "triton" (float32, on a GPU), "torch" (plain PyTorch) or "auto": triton where it can run.
        precision: what the Triton kernels may round operands of products to, forward and backward: "fp32" (not at
            all), "tf32x3" (nor here, but a product is three of tf32: to 2^-21), "tf32", "fp16" (gradients too: scale
            the loss) or "bf16". Layers of at most 4 inputs, sums and the sine's argument stay float32. Plain PyTorch
            rounds nothing.

    Returned in the wider dtype of x and weight.

    Raises InputError for shapes, dtypes or devices that do not belong together, an unknown implementation or precision,
    and for "triton" where it cannot run.
    """
    _check("sine_linear", x, weight, bias, stacked=False)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    omega = _check_omega(omega)
    if not _use_triton(implementation, precision, x.device, dtype, weight.numel()):
        return reference.sine_linear(x, weight, bias, omega)
    x, weight, bias, out_dtype = reference._widen(x, weight, bias)
    points = x.reshape(1, math.prod(x.shape[:-1]), x.shape[-1])
    y = _sine(points, weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0), omega, precision)
    return y.reshape(*x.shape[:-1], weight.shape[0]).to(out_dtype)


def batched_sine_linear(
    x: Tensor,  # [P, in], shared by all networks, or [N, P, in]
    weight: Tensor,  # [N, out, in]
    bias: Tensor | None = None,  # [N, out]
    omega: float | Tensor = 30.0,
    *,
    implementation: str = "auto",
    precision: str = "fp32",
) -> Tensor:  # [N, P, out]
    """N sine layers in one product: y_n = sin(omega (x_n W_n^T + b_n)). Arguments and errors as in `sine_linear`."""
    _check("batched_sine_linear", x, weight, bias, stacked=True)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    omega = _check_omega(omega)
    if not _use_triton(implementation, precision, x.device, dtype, weight.numel()):
        return reference.batched_sine_linear(x, weight, bias, omega)
    x, weight, bias, out_dtype = reference._widen(x, weight, bias)
    return _sine(_stack(x), weight, bias, omega, precision).to(out_dtype)


def multi_head_linear(
    x: Tensor,  # [P, in], shared by all heads, or [N, P, in]
    weight: Tensor,  # [N, out, in]
    bias: Tensor | None = None,  # [N, out]
    *,
    implementation: str = "auto",
    precision: str = "fp32",
) -> Tensor:  # [N, P, out]
    """N linear maps in one product: y_n = x_n W_n^T + b_n.

    Follows autocast, as nn.Linear does; operands of half precision are multiplied as they are and added in float32,
    whatever `precision` says. Other arguments and errors as in `sine_linear`.
    """
    _check("multi_head_linear", x, weight, bias, stacked=True)
    cast = _autocast_dtype(x)
    if cast is None and any(t is not None and t.dtype != x.dtype for t in (weight, bias)):
        got = f"{x.dtype} for x, {weight.dtype} for weight" + ("" if bias is None else f", {bias.dtype} for bias")
        raise bad_input("multi_head_linear", "one dtype for x, weight and bias", got, "Convert them with .to().")
    dtype = cast or x.dtype
    if not _use_triton(implementation, precision, x.device, dtype, weight.numel()):
        return reference.multi_head_linear(x, weight, bias)
    x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return linear(_stack(x), weight, bias, HALVES.get(dtype, precision))


def check_layer_choice(implementation: str, precision: str) -> None:
    """The words; whether they can run is known when a tensor comes. Raises InputError."""
    fix = "'native' and 'tiled' are for whole training steps: siren_mse, fit."
    check_choice("implementation", implementation, LAYER_IMPLEMENTATIONS, fix)
    check_choice("precision", precision, PRECISIONS)


def _use_triton(implementation: str, precision: str, device: torch.device, dtype: torch.dtype, size: int) -> bool:
    check_layer_choice(implementation, precision)
    # A layer on the CPU is PyTorch's own product; a warning about that, or about a device of shapes only, helps nobody.
    if implementation == "torch" or (implementation == "auto" and device.type in ("cpu", "meta")):
        return False
    if dtype not in (torch.float32, torch.float64, *HALVES):
        if implementation == "triton":
            raise bad_input("implementation", "'triton' with floats", str(dtype), "Use 'auto'.")
        return False
    if torch.compiler.is_compiling() and _is_transformed():
        if implementation == "triton":
            fix = "Use 'auto', which is plain PyTorch there, or compile the layer without the transform."
            raise bad_input("implementation", "'auto' where forward mode or torch.func is compiled", "'triton'", fix)
        return False
    return _chosen(implementation, device, dtype) == "triton" and size > 0


def _chosen(implementation: str, device: torch.device, dtype: torch.dtype) -> str:
    return choose(implementation, device, dtype).name


# torch.compiler.assume_constant_result without the import of the compiler: it cannot trace what looks for Triton.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _is_transformed() -> bool:
    """Within forward mode or torch.func: what the compiler's node, a custom op, would answer with zeros or refuse."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _sine(x: Tensor, weight: Tensor, bias: Tensor | None, omega: float | Tensor, precision: str) -> Tensor:
    """[G, P, in] -> [N, P, out] by the kernels, which take omega as a number."""
    if isinstance(omega, Tensor):
        # Folded into the parameters it needs no copy to the host, and its gradient comes through theirs.
        factor = omega.to(weight.dtype)
        weight, bias, omega = weight * factor, None if bias is None else bias * factor, 1.0
    # A custom op cannot see grad mode, so whether the sine's argument will be needed is said here.
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    return sine(x, weight, bias, omega, save, precision)[0]


def _stack(x: Tensor) -> Tensor:
    """[P, in] or [N, P, in] -> [1, P, in] or [N, P, in]"""
    return x.unsqueeze(0) if x.ndim == 2 else x


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast, where it is on, makes of the operands of a product; it leaves float64 alone."""
    device = x.device.type
    if device not in reference.AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return None
    return None if x.dtype == torch.float64 else torch.get_autocast_dtype(device)


def _check_omega(omega: Any) -> float | Tensor:
    """A float, or a tensor without axes."""
    if not isinstance(omega, Tensor):
        # A number that changed since it was first compiled is a symbol, which has no answer to whether it is finite.
        return float(omega) if torch.compiler.is_compiling() else check_real("omega", omega)
    if omega.numel() != 1:
        raise bad_input("omega", "a number or a tensor of one element", list(omega.shape), "Scale the weights instead.")
    return omega.reshape(())


def _check(what: str, x: Tensor, weight: Tensor, bias: Tensor | None, *, stacked: bool) -> None:
    """Shapes and devices, before anything is allocated."""
    axes = 3 if stacked else 2
    if weight.ndim != axes:
        expected = "shape [N, out, in]" if stacked else "shape [out, in]"
        fix = "Use sine_linear for one network." if stacked else "Use batched_sine_linear for several networks."
        raise bad_input(f"weight of {what}", expected, list(weight.shape), fix)
    fits = x.ndim >= 1 and x.shape[-1] == weight.shape[-1]
    expected = f"shape [..., {weight.shape[-1]}]"
    if stacked:
        num = weight.shape[0]
        fits = fits and (x.ndim == 2 or (x.ndim == 3 and x.shape[0] == num))
        expected = f"shape [P, {weight.shape[-1]}] or [{num}, P, {weight.shape[-1]}]"
    if not fits:
        raise bad_input(f"x of {what}", expected, list(x.shape), "The last axis holds the features.")
    if bias is not None and bias.shape != weight.shape[:-1]:
        raise bad_input(f"bias of {what}", f"shape {list(weight.shape[:-1])}", list(bias.shape), "Match the weight.")
    devices = {str(t.device) for t in (x, weight, bias) if t is not None}
    if len(devices) > 1:
        got = f"{x.device} for x, {weight.device} for weight" + ("" if bias is None else f", {bias.device} for bias")
        raise bad_input(what, "one device for x, weight and bias", got, "Move them to one with .to().")

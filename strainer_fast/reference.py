"""Every formula of the package once, in plain PyTorch: the truth for tests and the fallback at run time.

Shapes: P points, N signals, in/out features, H width, C channels. Everything here is differentiable to any
order with respect to every tensor argument, and computes in float32 at least: lower-precision inputs are
widened first and autocast does not reach the sine's argument (a bfloat16 z of 30 is off by up to 0.06).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from strainer_fast._checks import Omega, bad_input, omega_per_layer

AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(d))
"""Types of devices that autocast knows. Asked once: torch.compile cannot trace the question in PyTorch 2.6 to 2.11."""


def sine_linear(
    x: Tensor,  # [..., in]
    weight: Tensor,  # [out, in]
    bias: Tensor | None = None,  # [out]
    omega: float | Tensor = 30.0,
) -> Tensor:  # [..., out]
    """y = sin(omega * (x W^T + b)), SIREN's layer (Sitzmann et al. 2020, section 3.2). omega scales the bias too."""
    with no_autocast(x):
        x, weight, bias, out_dtype = _widen(x, weight, bias)
        return torch.sin(omega * F.linear(x, weight, bias)).to(out_dtype)


def multi_head_linear(
    x: Tensor,  # [P, in] shared by all heads, or [N, P, in] one input per head
    weight: Tensor,  # [N, out, in]
    bias: Tensor | None = None,  # [N, out]
) -> Tensor:  # [N, P, out]
    """N linear maps in one product: y_n = x W_n^T + b_n, with x shared or one per head.

    Heads that share their input are one [P, in] x [in, N*out] product.
    """
    num_heads, out_features, in_features = weight.shape
    if x.ndim == 2:
        flat = F.linear(x, weight.reshape(num_heads * out_features, in_features), _flat(bias))
        return flat.view(x.shape[0], num_heads, out_features).transpose(0, 1)
    if bias is None:
        return torch.bmm(x, weight.transpose(1, 2))
    return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))


def batched_sine_linear(
    x: Tensor,  # [P, in] or [N, P, in]
    weight: Tensor,  # [N, out, in]
    bias: Tensor | None = None,  # [N, out]
    omega: float | Tensor = 30.0,
) -> Tensor:  # [N, P, out]
    """N sine layers in one product: y_n = sin(omega * (x_n W_n^T + b_n))."""
    with no_autocast(x):
        x, weight, bias, out_dtype = _widen(x, weight, bias)
        return torch.sin(omega * multi_head_linear(x, weight, bias)).to(out_dtype)


def siren(
    points: Tensor,  # [..., in]; [P, in] where a layer is stacked
    weights: Sequence[Tensor],  # L of [out, in], or [N, out, in] for layers of N stacked networks
    biases: Sequence[Tensor | None],
    omega: Omega = 30.0,
) -> Tensor:  # [..., C], or [N, P, C] when stacked
    """A SIREN of L linear layers: L-1 sine layers and a linear one.

    A stacked layer ([N, out, in]) may follow plain ones: that is STRAINER's encoder with one decoder per signal.
    """
    omegas = omega_per_layer(omega, len(weights) - 1)
    h = points
    for weight, bias, layer_omega in zip(weights[:-1], biases[:-1], omegas, strict=True):
        layer = sine_linear if weight.ndim == 2 else batched_sine_linear
        h = layer(h, weight, bias, layer_omega)
    last = F.linear if weights[-1].ndim == 2 else multi_head_linear
    return last(h, weights[-1], biases[-1])


def strainer(
    points: Tensor,  # [P, in]
    encoder_weights: Sequence[Tensor],  # K of [out, in]
    encoder_biases: Sequence[Tensor | None],
    decoder_weights: Sequence[Tensor],  # L-K of [N, out, in]
    decoder_biases: Sequence[Tensor | None],
    omega: Omega = 30.0,
) -> Tensor:  # [N, P, C]
    """STRAINER (arXiv 2409.09566, section 3): K sine layers shared by N signals, then one decoder per signal."""
    return siren(points, [*encoder_weights, *decoder_weights], [*encoder_biases, *decoder_biases], omega)


def mse(
    prediction: Tensor,  # [..., P, C]
    target: Tensor,  # [..., P, C]
) -> Tensor:  # [...]
    """Mean squared error of each signal, over its points and channels."""
    return (prediction - target).square().mean(dim=(-2, -1))


def psnr(mse: Tensor) -> Tensor:  # [...] -> [...]
    """-10 log10(MSE) in dB: peak 1, predictions not clamped. An MSE of 0 gives infinity."""
    return -10.0 * torch.log10(mse)


def least_squares_heads(
    features: Tensor,  # [P, H] shared, or [N, P, H]
    values: Tensor,  # [N, P, C]
    ridge: float = 1e-4,
) -> tuple[Tensor, Tensor]:  # weight [N, C, H], bias [N, C]
    """The linear heads that fit `values` best on frozen features, in closed form and float64.

    Minimises, per signal, |F W^T + b - Y|^2 / P + lambda |W|^2 with lambda = ridge * (mean feature variance);
    the bias is not penalised. Returned in the dtype of `values`.

    Raises InputError for shapes that do not belong together, a negative ridge, or one too small for features that
    depend on each other.
    """
    if features.ndim not in (2, 3) or values.ndim != 3 or features.shape[-2] != values.shape[-2]:
        raise bad_input(
            "least_squares_heads",
            "features [P, H] or [N, P, H] and values [N, P, C] with the same P",
            f"{tuple(features.shape)} and {tuple(values.shape)}",
            "Give every signal the same points.",
        )
    if ridge < 0:
        raise bad_input("ridge", "a number of at least 0", ridge, "Use 0 for plain least squares.")
    f, y = features.double(), values.double()
    f_mean, y_mean = f.mean(dim=-2, keepdim=True), y.mean(dim=-2, keepdim=True)
    f, y = f - f_mean, y - y_mean
    covariance = f.transpose(-1, -2) @ f / f.shape[-2]  # [H, H] or [N, H, H]
    cross = f.transpose(-1, -2) @ y / f.shape[-2]  # [N, H, C]
    weight = heads_from_moments(covariance, cross, ridge)
    bias = (y_mean - f_mean @ weight.transpose(-1, -2)).squeeze(-2)
    return weight.to(values.dtype), bias.to(values.dtype)


def heads_from_moments(
    covariance: Tensor,  # [H, H] or [N, H, H] of the features
    cross: Tensor,  # [N, H, C] of features and values
    ridge: float,
) -> Tensor:  # weight [N, C, H]
    """The weights of `least_squares_heads` from second moments about the means.

    Raises InputError for a ridge that is too small.
    """
    width = covariance.shape[-1]
    variance = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    # Constant features (one point, say) leave nothing to solve: any positive lambda then gives weight 0.
    strength = torch.where(variance > 0, ridge * variance, torch.ones_like(variance))
    eye = torch.eye(width, dtype=covariance.dtype, device=covariance.device)
    # Not linalg.solve: its LU fails on some CPU builds once torch.set_num_threads was raised and lowered again.
    factor, failed = torch.linalg.cholesky_ex(covariance + strength * eye)
    if failed.any():
        raise bad_input("ridge", "enough to make the features' covariance definite", ridge, "Use 1e-8 or more.")
    return torch.cholesky_solve(cross, factor).transpose(-1, -2)


def _flat(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.reshape(-1)


def _widen(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, torch.dtype]:
    """Operands in float32 at least, and the dtype the caller expects back."""
    out_dtype = torch.promote_types(x.dtype, weight.dtype)
    dtype = torch.promote_types(out_dtype, torch.float32)
    return x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), out_dtype


def no_autocast(x: Tensor) -> torch.autocast | nullcontext[None]:
    """Within, products on the device of `x` keep the dtype of their operands."""
    device = x.device.type
    if device not in AUTOCAST_DEVICES or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)

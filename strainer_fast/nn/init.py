"""SIREN's initialisation rules (Sitzmann et al. 2020, section 3.2; STRAINER keeps them), written once."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weight_bound(in_features: int, omega: float, is_first: bool) -> float:
    """Half width of the uniform distribution of a weight: 1/in in the first layer, sqrt(6/in)/omega elsewhere."""
    return 1.0 / in_features if is_first else math.sqrt(6.0 / in_features) / omega


@torch.no_grad()
def init_linear_(
    weight: Tensor,  # [..., out, in]
    bias: Tensor | None,  # [..., out]
    omega: float,
    is_first: bool,
    generator: torch.Generator | None = None,
) -> None:
    """Draw a layer's weight, then its bias U(+-1/sqrt(in)) (PyTorch's default), in place.

    The generator lives on the CPU and so do the draws: the same seed gives the same network on every device.
    """
    in_features = weight.shape[-1]
    _uniform_(weight, weight_bound(in_features, omega, is_first), generator)
    if bias is not None:
        _uniform_(bias, 1.0 / math.sqrt(in_features), generator)


def _uniform_(tensor: Tensor, bound: float, generator: torch.Generator | None) -> None:
    if tensor.device.type in ("cpu", "meta"):
        tensor.uniform_(-bound, bound, generator=generator)
    else:
        tensor.copy_(torch.empty(tensor.shape, dtype=tensor.dtype).uniform_(-bound, bound, generator=generator))

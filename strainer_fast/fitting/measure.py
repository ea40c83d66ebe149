"""PSNR of networks as they are, on all points: what results report and `verify` computes again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from strainer_fast import reference
from strainer_fast.fitting.engine import CHUNK


@torch.no_grad()
def measure_psnr(
    weights: Mapping[str, Tensor],  # stacked [N, ...], named as in BatchedSiren
    omegas: Sequence[float],
    points: Tensor,  # [P, D]
    samples: Tensor,  # [N, P, C]
) -> list[float]:
    """PSNR in dB of N networks on all points, as a Siren's forward gives it; errors summed in float64.

    Network by network, in PyTorch: no bit depends on the company or on what has fitted them.
    """
    layers = [*(f"layers.{i}" for i in range(len(omegas))), "head"]
    matrices, biases = ([weights[f"{layer}.{kind}"] for layer in layers] for kind in ("weight", "bias"))
    psnr = []
    for n, values in enumerate(samples):
        squares = torch.zeros((), dtype=torch.float64, device=points.device)
        for start in range(0, len(points), CHUNK):
            block = slice(start, start + CHUNK)
            found = reference.siren(points[block], [m[n] for m in matrices], [b[n] for b in biases], omegas)
            squares += (found - values[block]).double().square().sum()
        psnr.append(float(-10 * (squares / values.numel()).log10()))
    return psnr

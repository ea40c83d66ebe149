"""Where a fit starts: parameters of N stacked networks, one per signal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from strainer_fast import reference
from strainer_fast._checks import bad_input
from strainer_fast.fitting.recipe import AUTO
from strainer_fast.models import Architecture, BatchedSiren, Encoder, Siren

CHUNK = 2**13
"""Points whose features are held at once, in float64."""


def signal_seed(seed: int, fingerprint: str) -> int:
    """The seed that a fit draws a signal's initial weights from: the recipe's and the signal's own values.

    `fingerprint` is `Signal.fingerprint()`. So a signal starts the same alone, in any company and at any place.
    """
    return (seed + int(fingerprint, 16)) % 2**63


def initial_stack(
    init: Encoder | Architecture,
    in_features: int,
    out_features: int,
    seeds: Sequence[int],
    weight_scale: float = 1.0,
) -> BatchedSiren:
    """N networks drawn by SIREN's rules from their own seeds; with an encoder, its layers replace the first K.

    `weight_scale` is for networks without an encoder; see Recipe.
    """
    drawn: dict[int, Siren] = {}
    for seed in set(seeds):
        generator = torch.Generator().manual_seed(seed)
        if isinstance(init, Encoder):
            drawn[seed] = Siren.from_encoder(init, out_features, generator=generator)
        else:
            siren = Siren(in_features, init.hidden_features, init.num_layers, out_features, init.omegas)
            siren.reset_parameters(generator)
            scale_hidden(siren.layers, weight_scale)
            drawn[seed] = siren
    return BatchedSiren.from_sirens([drawn[seed] for seed in seeds])


def resolve_scale(weight_scale: float | str, shape: Sequence[int]) -> float:
    """Recipe.weight_scale as a number, for signals of `shape` samples per axis."""
    if weight_scale != AUTO:
        return float(weight_scale)
    samples = math.pow(math.prod(shape), 1 / len(shape))
    return min(3.0, max(1.0, 2.0 * math.pow(samples / 178, 0.36)))


@torch.no_grad()
def scale_hidden(layers: nn.ModuleList, weight_scale: float) -> None:
    """Multiply the weights of all sine layers but the first, in place (arXiv 2410.04779)."""
    for layer in list(layers)[1:]:
        cast(Tensor, layer.weight).mul_(weight_scale)


@torch.no_grad()
def least_squares_start(
    stack: BatchedSiren, points: Tensor, values: Tensor, ridge: float, same_features: bool = False
) -> None:
    """Replace the heads by the closed-form best ones on the features as they are, in place.

    `reference.least_squares_heads`, from moments that are summed some points at a time. `same_features` says that all
    networks have the same sine layers, whose features are then computed once.
    """
    first = stack.siren(0) if same_features else None
    sums: list[Tensor] | None = None
    for start in range(0, len(points), CHUNK):
        block = points[start : start + CHUNK]
        f = (stack.features(block) if first is None else first.features(block)[None]).double()  # [N, P, H] or [1, P, H]
        y = values[:, start : start + CHUNK].double()
        # Network by network: a batch of products with a vector has other bits than one of them.
        cross = torch.stack([f[n % len(f)].mT @ y[n] for n in range(len(y))])
        parts = [f.sum(1, keepdim=True), y.sum(1, keepdim=True), f.mT @ f, cross]
        sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
    f_mean, y_mean, covariance, cross = (s / len(points) for s in sums or ())
    weight = reference.heads_from_moments(covariance - f_mean.mT @ f_mean, cross - f_mean.mT @ y_mean, ridge)
    stack.head.weight.copy_(weight)
    if stack.head.bias is not None:
        stack.head.bias.copy_(y_mean.squeeze(1) - (f_mean * weight).sum(-1))


@torch.no_grad()
def mean_start(stack: BatchedSiren, encoder: Encoder) -> None:
    """Replace all that follows the encoder by the mean of the pre-training decoders, in place."""
    own = stack.state_dict()
    for name, decoders in (encoder.decoders or {}).items():
        own[name].copy_(decoders.mean(dim=0))


def check_start(start: str, init: Encoder | Architecture, channels: Sequence[int]) -> None:
    """Refuse a start that this initialisation cannot give."""
    if start == "mean":
        if not isinstance(init, Encoder):
            fix = "Pass an encoder, or start='random'."
            raise bad_input("start", "'random' or 'least_squares' for a SIREN that was not trained", repr(start), fix)
        if init.decoders is None:
            raise bad_input("start", "an encoder with its decoders", "none in it", "Use 'random' or 'least_squares'.")
        trained = init.decoders["head.weight"].shape[1]
        if any(c != trained for c in channels):
            raise bad_input(
                "start",
                f"signals of {trained} channels, as the pre-training decoders have",
                f"{sorted(set(channels))} channels",
                "Use start='random' or 'least_squares', or convert the signals.",
            )

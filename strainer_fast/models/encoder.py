"""What pre-training leaves: the shared sine layers, and what is known about how they came to be."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from strainer_fast._checks import check_count
from strainer_fast._files import Shapes, read_tensors, write_tensors
from strainer_fast.models.architecture import Architecture
from strainer_fast.nn import SineLinear

MAX_COORDINATES = 16
MAX_CHANNELS = 4096
"""Bounds against files that ask for absurd allocations."""


class Encoder(nn.Module):
    """STRAINER's shared encoder: the first K sine layers of a network.

    Args:
        in_features: coordinates per point (2 for images).
        architecture: sizes of the whole network the encoder was made for; it holds the first
            `num_shared_layers` of its layers.
        device, dtype: of the parameters.

    Attributes:
        decoders: the decoders of pre-training, stacked [N, ...] and named as in BatchedSiren
            (`layers.K.weight`, ..., `head.weight`), or None. They are no part of the module's state_dict.
        record: what pre-training wrote down (recipe, signals, PSNR, seed, ...), plain JSON data.

    Shapes: points [..., in] -> features [..., H].
    """

    def __init__(
        self,
        in_features: int,
        architecture: Architecture,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = check_count("in_features", in_features)
        self.architecture = architecture
        self.decoders: dict[str, Tensor] | None = None
        self.record: dict[str, Any] = {}
        hidden = architecture.hidden_features
        self.layers = nn.ModuleList(
            SineLinear(in_features if i == 0 else hidden, hidden, omega=o, is_first=i == 0, device=device, dtype=dtype)
            for i, o in enumerate(architecture.omegas[: architecture.num_shared_layers])
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters by SIREN's rules, layer by layer."""
        for layer in self.layers:
            cast(SineLinear, layer).reset_parameters(generator)

    def forward(self, points: Tensor) -> Tensor:
        """[..., in] -> [..., H]"""
        for layer in self.layers:
            points = layer(points)
        return points

    def fingerprint(self) -> str:
        """A hash of the weights and omegas: tells whether two runs started from the same encoder."""
        digest = hashlib.sha256(repr(self.architecture).encode())
        for tensor in self.state_dict().values():
            digest.update(tensor.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, path: str | Path) -> None:
        """Write encoder, decoders and record to one safetensors file, whole or not at all."""
        tensors = {f"encoder.{name}": p for name, p in self.state_dict().items()}
        tensors |= {f"decoders.{name}": p for name, p in (self.decoders or {}).items()}
        metadata = {
            "in_features": self.in_features,
            "architecture": self.architecture.as_dict(),
            "decoders": None if self.decoders is None else list(self.decoders["head.weight"].shape[:2]),
            "record": self.record,
        }
        write_tensors(Path(path), "encoder", tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Encoder:
        """Read what `save` wrote.

        Raises InputError for a file that is missing, cut short, damaged, not ours or of another format version.
        """
        tensors, document = read_tensors(Path(path), "encoder", _file_shapes)
        dtype = tensors["encoder.layers.0.weight"].dtype
        encoder = cls(document["in_features"], Architecture(**document["architecture"]), dtype=dtype)
        encoder.load_state_dict({n.removeprefix("encoder."): t for n, t in tensors.items() if n.startswith("encoder.")})
        decoders = {n.removeprefix("decoders."): t for n, t in tensors.items() if n.startswith("decoders.")}
        encoder.decoders = decoders or None
        encoder.record = document["record"]
        return encoder


def _file_shapes(document: dict[str, Any]) -> Shapes:
    architecture = Architecture(**document["architecture"])
    in_features = check_count("in_features", document["in_features"], 1, MAX_COORDINATES)
    shared = architecture.num_shared_layers
    layers = architecture.layer_shapes(in_features)
    shapes: Shapes = {}
    for i, (out, width) in enumerate(layers[:shared]):
        shapes |= {f"encoder.layers.{i}.weight": (out, width), f"encoder.layers.{i}.bias": (out,)}
    if document["decoders"] is not None:
        num = check_count("decoders", document["decoders"][0])
        channels = check_count("channels", document["decoders"][1], 1, MAX_CHANNELS)
        for i, (out, width) in enumerate(layers[shared:], start=shared):
            shapes |= {f"decoders.layers.{i}.weight": (num, out, width), f"decoders.layers.{i}.bias": (num, out)}
        shapes["decoders.head.weight"] = (num, channels, architecture.hidden_features)
        shapes["decoders.head.bias"] = (num, channels)
    return shapes

"""STRAINER's pre-training network: one encoder, N decoders."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from strainer_fast._checks import Omega, check_count
from strainer_fast.models.architecture import Architecture
from strainer_fast.models.encoder import Encoder
from strainer_fast.models.siren import Siren, layer_parameters, siren_from_rows
from strainer_fast.nn import BatchedSineLinear, MultiHeadLinear
from strainer_fast.ops import strainer_mse


class Strainer(nn.Module):
    """K sine layers shared by N signals, then a decoder per signal (arXiv 2409.09566, section 3).

    The N decoders advance together: each of their levels is one batched product, whatever their depth.

    Args:
        in_features: coordinates per point (2 for images).
        hidden_features: width of every sine layer.
        num_layers: L, all linear layers from input to output, the last included. The paper has 6.
        out_features: channels C of every signal.
        num_shared_layers: K, sine layers in the encoder, 1 to L-1. The paper has 5: one linear layer per decoder.
        num_decoders: N.
        omega: a number, or one per sine layer (L-1).
        device, dtype: of the parameters.

    Shapes: points [P, in] -> values [N, P, C].

    Raises InputError for sizes out of range.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_layers: int,
        out_features: int,
        num_shared_layers: int,
        num_decoders: int,
        omega: Omega = 30.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.architecture = Architecture(hidden_features, num_layers, num_shared_layers, omega)
        self.num_decoders = check_count("num_decoders", num_decoders)
        self.encoder = Encoder(in_features, self.architecture, device=device, dtype=dtype)
        omegas = self.architecture.omegas
        self.decoder = nn.ModuleList(
            BatchedSineLinear(num_decoders, hidden_features, hidden_features, omega=o, device=device, dtype=dtype)
            for o in omegas[num_shared_layers:]
        )
        self.head = MultiHeadLinear(
            num_decoders, hidden_features, out_features, omega=omegas[-1], device=device, dtype=dtype
        )

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters by SIREN's rules: encoder, then decoders level by level."""
        self.encoder.reset_parameters(generator)
        for layer in [*self.decoder, self.head]:
            layer.reset_parameters(generator)

    def encoder_state(self) -> dict[str, Tensor]:
        """A copy of the encoder's parameters, named as in Siren (`layers.0.weight`, ...).

        Feed it to `Siren.from_encoder`, which also finds the omegas of the whole network in it, or to
        `Siren.load_state_dict(..., strict=False)`.
        """
        state = OrderedDict((name, p.detach().clone()) for name, p in self.encoder.state_dict().items())
        # Beside the tensors, where PyTorch keeps a state_dict's own metadata.
        state._metadata = {"omegas": self.architecture.omegas}  # type: ignore[attr-defined]
        return state

    def decoder_state(self) -> dict[str, Tensor]:
        """A copy of the decoders' parameters, stacked [N, ...] and named as in BatchedSiren."""
        shared = self.architecture.num_shared_layers
        named = {f"layers.{shared + i}": layer for i, layer in enumerate(self.decoder)} | {"head": self.head}
        return {
            f"{prefix}.{name}": p.detach().clone()
            for prefix, layer in named.items()
            for name, p in layer.state_dict().items()
        }

    def siren(self, index: int) -> Siren:
        """Encoder and decoder `index` as a Siren of its own (a copy)."""
        decoder = {name: p[index] for name, p in self.decoder_state().items()}
        return siren_from_rows(self.encoder_state() | decoder, self.architecture.omegas)

    def forward(self, points: Tensor) -> Tensor:
        """[P, in] -> [N, P, C]"""
        h = self.encoder(points)
        for layer in self.decoder:
            h = layer(h)
        values: Tensor = self.head(h)
        return values

    def loss(
        self,
        points: Tensor,  # [P, in]
        values: Tensor,  # [N, P, C]
        *,
        signal_weights: Tensor | None = None,  # [N]
        point_weights: Tensor | None = None,  # [P] or [N, P]
        implementation: str = "auto",
        precision: str = "fp32",
    ) -> tuple[Tensor, Tensor]:  # [], [N]
        """(sum of the signals' mean squared errors, each of them) in one pass; see `strainer_fast.ops.strainer_mse`."""
        weights, biases = layer_parameters([*self.encoder.layers, *self.decoder, self.head])
        return strainer_mse(
            points,
            values,
            weights,
            biases,
            self.architecture.omegas,
            signal_weights=signal_weights,
            point_weights=point_weights,
            implementation=implementation,
            precision=precision,
        )

"""SIREN, alone and as a stack of N independent networks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from strainer_fast._checks import Omega, bad_input, check_count, omega_per_layer
from strainer_fast.models.encoder import Encoder
from strainer_fast.nn import BatchedSineLinear, MultiHeadLinear, SineLinear
from strainer_fast.nn.init import init_linear_
from strainer_fast.ops import batched_siren_mse, siren_mse, siren_values


class Siren(nn.Module):
    """A SIREN of `num_layers` linear layers in all: sine layers `layers`, then a linear `head`.

    Args:
        in_features: coordinates per point (2 for images).
        hidden_features: width of every sine layer.
        num_layers: all linear layers counted, the last included (alpine calls this `hidden_layers`).
        out_features: channels.
        omega: a number, or one per sine layer (num_layers - 1).
        device, dtype: of the parameters.

    Shapes: points [..., in] -> values [..., C].

    Raises InputError for sizes below 1 or an omega of the wrong length.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        num_layers: int,
        out_features: int,
        omega: Omega = 30.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_layers", num_layers)
        check_count("out_features", out_features)
        self.omegas = omega_per_layer(omega, num_layers - 1)
        self.layers = nn.ModuleList(
            SineLinear(
                in_features if i == 0 else hidden_features,
                hidden_features,
                omega=o,
                is_first=i == 0,
                device=device,
                dtype=dtype,
            )
            for i, o in enumerate(self.omegas)
        )
        head_in = hidden_features if num_layers > 1 else in_features
        self.head = nn.Linear(head_in, out_features, device=device, dtype=dtype)
        self._reset_head(None)

    @classmethod
    def from_encoder(
        cls,
        encoder: Encoder | Mapping[str, Tensor],
        out_features: int,
        num_layers: int | None = None,
        omega: Omega | None = None,
        generator: torch.Generator | None = None,
    ) -> Siren:
        """STRAINER at test time: the encoder's sine layers copied, all that follows drawn at random.

        Args:
            encoder: an `Encoder`, or the dict that `Strainer.encoder_state()` returns.
            out_features: channels of the new signal; may differ from those the encoder was trained with.
            num_layers: all linear layers of the new network; None takes the encoder's own number (for a dict,
                one linear layer after the encoder).
            omega: None takes the encoder's, repeated for further layers (30 for a plain dict, which has none).
            generator: CPU generator for the random part.
        """
        if isinstance(encoder, Encoder):
            state: Mapping[str, Tensor] = encoder.state_dict()
            num_layers = encoder.architecture.num_layers if num_layers is None else num_layers
            own: tuple[float, ...] = encoder.architecture.omegas
        else:
            state, own = encoder, getattr(encoder, "_metadata", {}).get("omegas", (30.0,))
        num_shared = sum(name.endswith(".weight") for name in state)
        first = state.get("layers.0.weight")
        if first is None or not all(name.startswith("layers.") for name in state):
            raise bad_input("encoder", "layers.0.weight, ... only", sorted(state), "Pass Strainer.encoder_state().")
        num_layers = num_shared + 1 if num_layers is None else num_layers
        if num_layers <= num_shared:
            raise bad_input(
                "num_layers",
                f"more than the encoder's {num_shared} sine layers",
                num_layers,
                "The last layer of a network is linear and not part of the encoder.",
            )
        if omega is None:
            omega = (*own, *own[-1:] * num_layers)[: num_layers - 1]
        hidden, in_features = first.shape
        siren = cls(in_features, hidden, num_layers, out_features, omega, device=first.device, dtype=first.dtype)
        siren.reset_parameters(generator)
        siren.load_state_dict({**siren.state_dict(), **state})
        return siren

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters by SIREN's rules, layer by layer."""
        for layer in self.layers:
            cast(SineLinear, layer).reset_parameters(generator)
        self._reset_head(generator)

    def _reset_head(self, generator: torch.Generator | None) -> None:
        omega = self.omegas[-1] if self.omegas else 30.0
        init_linear_(self.head.weight, self.head.bias, omega, is_first=not self.omegas, generator=generator)

    def features(self, points: Tensor) -> Tensor:
        """What the head sees: [..., in] -> [..., H]."""
        for layer in self.layers:
            points = layer(points)
        return points

    def forward(self, points: Tensor) -> Tensor:
        """[..., in] -> [..., C]"""
        values: Tensor = self.head(self.features(points))
        return values

    def values(
        self,
        points: Tensor,  # [P, in]
        *,
        implementation: str = "auto",
        precision: str = "fp32",
    ) -> Tensor:  # [P, C]
        """Values at points without gradients, for rendering; see `strainer_fast.ops.siren_values`."""
        weights, biases = layer_parameters([*self.layers, self.head])
        return siren_values(points, weights, biases, self.omegas, implementation=implementation, precision=precision)

    def loss(
        self,
        points: Tensor,  # [P, in]
        values: Tensor,  # [P, C]
        *,
        point_weights: Tensor | None = None,  # [P]
        implementation: str = "auto",
        precision: str = "fp32",
    ) -> Tensor:  # []
        """Mean squared error in one pass; see `strainer_fast.ops.siren_mse`."""
        weights, biases = layer_parameters([*self.layers, self.head])
        return siren_mse(
            points,
            values,
            weights,
            biases,
            self.omegas,
            point_weights=point_weights,
            implementation=implementation,
            precision=precision,
        )


class BatchedSiren(nn.Module):
    """N independent SIRENs of one shape that advance together; every parameter is stacked [N, ...].

    Args as in Siren, after `num_signals` (N). Parameter names are Siren's, so row n of each is network n.

    Shapes: points [P, in], shared by all, or [N, P, in] -> values [N, P, C].
    """

    def __init__(
        self,
        num_signals: int,
        in_features: int,
        hidden_features: int,
        num_layers: int,
        out_features: int,
        omega: Omega = 30.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_count("num_layers", num_layers, 2)
        self.num_signals = check_count("num_signals", num_signals)
        self.omegas = omega_per_layer(omega, num_layers - 1)
        self.layers = nn.ModuleList(
            BatchedSineLinear(
                num_signals,
                in_features if i == 0 else hidden_features,
                hidden_features,
                omega=o,
                is_first=i == 0,
                device=device,
                dtype=dtype,
            )
            for i, o in enumerate(self.omegas)
        )
        self.head = MultiHeadLinear(
            num_signals, hidden_features, out_features, omega=self.omegas[-1], device=device, dtype=dtype
        )

    @classmethod
    def from_sirens(cls, sirens: Sequence[Siren]) -> BatchedSiren:
        """Stack networks of one shape and omega; row n is a copy of sirens[n]."""
        states = [siren.state_dict() for siren in sirens]
        return cls.from_stack({name: torch.stack([s[name] for s in states]) for name in states[0]}, sirens[0].omegas)

    @classmethod
    def from_stack(cls, stack: Mapping[str, Tensor], omega: Omega) -> BatchedSiren:
        """A network around stacked tensors named as in `state_dict()`; the tensors are copied."""
        first, last = stack["layers.0.weight"], stack["head.weight"]
        num_layers = sum(name.endswith(".weight") for name in stack)
        model = cls(
            first.shape[0],
            first.shape[2],
            first.shape[1],
            num_layers,
            last.shape[1],
            omega,
            device=first.device,
            dtype=first.dtype,
        )
        model.load_state_dict(dict(stack))
        return model

    def siren(self, index: int) -> Siren:
        """Network `index` as a Siren of its own (a copy)."""
        return siren_from_rows({name: p.detach()[index] for name, p in self.state_dict().items()}, self.omegas)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters by SIREN's rules, layer by layer."""
        for layer in [*self.layers, self.head]:
            layer.reset_parameters(generator)

    def features(self, points: Tensor) -> Tensor:
        """What the heads see: [P, in] or [N, P, in] -> [N, P, H]."""
        for layer in self.layers:
            points = layer(points)
        return points

    def forward(self, points: Tensor) -> Tensor:
        """[P, in] or [N, P, in] -> [N, P, C]"""
        values: Tensor = self.head(self.features(points))
        return values

    def loss(
        self,
        points: Tensor,  # [P, in]
        values: Tensor,  # [N, P, C]
        *,
        point_weights: Tensor | None = None,  # [P] or [N, P]
        implementation: str = "auto",
        precision: str = "fp32",
    ) -> Tensor:  # [N]
        """Mean squared error of each network in one pass; see `strainer_fast.ops.batched_siren_mse`."""
        weights, biases = layer_parameters([*self.layers, self.head])
        return batched_siren_mse(
            points,
            values,
            weights,
            biases,
            self.omegas,
            point_weights=point_weights,
            implementation=implementation,
            precision=precision,
        )


def layer_parameters(layers: Iterable[nn.Module]) -> tuple[list[Tensor], list[Tensor | None]]:
    """(weights, biases) of layers in order."""
    typed = [cast(nn.Linear, layer) for layer in layers]
    return [layer.weight for layer in typed], [layer.bias for layer in typed]


def siren_from_rows(state: Mapping[str, Tensor], omega: Omega) -> Siren:
    """A Siren that holds copies of plain (unstacked) tensors named as in its state_dict."""
    head = state["head.weight"]
    num_layers = sum(name.endswith(".weight") for name in state)
    first = state["layers.0.weight"] if num_layers > 1 else head
    siren = Siren(
        first.shape[1],
        head.shape[1],
        num_layers,
        head.shape[0],
        omega,
        device=head.device,
        dtype=head.dtype,
    )
    siren.load_state_dict(dict(state))
    return siren

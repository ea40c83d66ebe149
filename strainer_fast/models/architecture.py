"""The sizes of a network, as data: what a checkpoint must carry to rebuild it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from strainer_fast._checks import Omega, check_count, omega_per_layer

MAX_WIDTH = 8192
MAX_LAYERS = 64
"""Bounds that no sensible network reaches: an untrusted file must not make us allocate without limit."""


@dataclass(frozen=True)
class Architecture:
    """A sine network of `num_layers` linear layers, of which the last one has no sine.

    Args:
        hidden_features: width H of every sine layer.
        num_layers: L, all linear layers counted, the last included. The paper has 6.
        num_shared_layers: K, how many of the L-1 sine layers a STRAINER encoder holds. The paper has 5.
        omega: frequency scale; a number, or one per sine layer (kept as a tuple of L-1 floats).

    Raises InputError when a size is out of range or K > L-1.
    """

    hidden_features: int = 256
    num_layers: int = 6
    num_shared_layers: int = 5
    omega: Omega = 30.0

    def __post_init__(self) -> None:
        checked = {
            "hidden_features": check_count("hidden_features", self.hidden_features, 1, MAX_WIDTH),
            "num_layers": check_count("num_layers", self.num_layers, 2, MAX_LAYERS),
            "num_shared_layers": check_count("num_shared_layers", self.num_shared_layers, 1, self.num_layers - 1),
            "omega": omega_per_layer(self.omega, self.num_layers - 1),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def omegas(self) -> tuple[float, ...]:
        """omega of each of the L-1 sine layers."""
        return omega_per_layer(self.omega, self.num_layers - 1)

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `Architecture(**data)` brings it back."""
        return {
            "hidden_features": self.hidden_features,
            "num_layers": self.num_layers,
            "num_shared_layers": self.num_shared_layers,
            "omega": list(self.omegas),
        }

    def layer_shapes(self, in_features: int) -> list[tuple[int, int]]:
        """(out, in) of each of the L-1 sine layers."""
        hidden = self.hidden_features
        return [(hidden, hidden if i else in_features) for i in range(self.num_layers - 1)]

    def __str__(self) -> str:
        omegas = set(self.omegas)
        omega = f"{omegas.pop():g}" if len(omegas) == 1 else ",".join(f"{o:g}" for o in self.omegas)
        return (
            f"{self.num_layers} layers of width {self.hidden_features}, "
            f"first {self.num_shared_layers} shared, omega {omega}"
        )

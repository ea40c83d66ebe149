"""What the host does in a step: bounds that the default recipes on a GPU were written for."""

import pytest

import strainer_fast as sf
from tests.standin.steps import RECIPES, counts_of

BOUNDS = {
    # PyTorch operations, single launches, synchronisations: means over ten steps, with one refresh of the factors
    "K-FAC (fast)": (25, 0, 1),
    "K-FAC from an encoder (fast)": (22, 0, 1),
    "Muon": (5, 0, 0.5),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_a_step_is_two_graphs_and_little_else(name: str) -> None:
    """K-FAC took 373 operations, 169 from an encoder, and Muon 110 and 9 synchronisations, by PyTorch's calls."""
    stepping = next(s for s in RECIPES if s.name == name)
    found = counts_of(stepping, sf.Architecture(hidden_features=80, num_layers=4, num_shared_layers=3), size=8)
    operations, launches, synchronisations = BOUNDS[name]
    assert found["replays"] == 2
    assert found["operations"] <= operations, found
    assert found["launches"] <= launches, found
    assert found["synchronisations"] <= synchronisations, found

"""Random numbers that depend on a seed and a position alone: what is drawn twice is the same twice."""

from __future__ import annotations

import torch


def generator_at(seed: int, position: int) -> torch.Generator:
    """A CPU generator for the `position`-th draw (a step, a signal) of a run with this seed."""
    return torch.Generator().manual_seed((1_000_003 * seed + position) % 2**63)

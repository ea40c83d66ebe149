"""Layers: SineLinear, BatchedSineLinear, MultiHeadLinear."""

from strainer_fast.nn.layers import BatchedSineLinear, MultiHeadLinear, SineLinear

__all__ = ["BatchedSineLinear", "MultiHeadLinear", "SineLinear"]

"""Output tensors full of NaN with guard zones of NaN around them: what is not written, or written outside, shows."""

import math

import torch
from torch import Tensor

UNIT = {"fp32": 2.0**-24, "tf32x3": 2.0**-21, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Half the distance between neighbouring numbers near 1: what rounding an operand costs at most; of tf32x3 what a
product loses, see mm.py."""


class Guards:
    """Makes guarded tensors and remembers the memory round them."""

    def __init__(self) -> None:
        self.memories: list[Tensor] = []

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        memory = torch.full((math.prod(shape) + 64,), math.nan, dtype=dtype)
        self.memories.append(memory)
        return memory[32 : 32 + math.prod(shape)].view(shape)

    def check(self) -> None:
        """Nothing was written outside."""
        for memory in self.memories:
            assert memory[:32].isnan().all()
            assert memory[-32:].isnan().all()


def relative(got: Tensor, want: Tensor) -> float:
    """Error by norm, in float64; NaN counts as an error."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    if want.numel() == 0:
        return 0.0
    error = float((got - want).norm() / want.norm().clamp_min(1e-30))
    return error if error == error else math.inf

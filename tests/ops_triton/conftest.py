"""The layers on Triton's kernels, under its interpreter where there is no GPU; decided once, before Triton loads."""

from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from tests.interpreter import interpret

if not torch.cuda.is_available():
    interpret()


@pytest.fixture(autouse=True)
def _default_device() -> Iterator[None]:
    """Every new tensor is on the GPU where there is one."""
    with torch.device("cuda") if torch.cuda.is_available() else nullcontext():
        yield


@pytest.fixture(autouse=True)
def _deterministic() -> Iterator[None]:
    """Nothing here may need a nondeterministic operation; and new memory is NaN, so that nothing unwritten passes."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

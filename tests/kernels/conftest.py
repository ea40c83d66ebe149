"""Kernel tests run under Triton's interpreter where there is no GPU; the choice is made once, before Triton loads."""

import pytest
import torch

from tests.interpreter import interpret

if not torch.cuda.is_available():
    interpret()


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_device(device: str):
    """Every new tensor is there."""
    with torch.device(device):
        yield

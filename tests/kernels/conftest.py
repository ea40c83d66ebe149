"""Kernel tests run under Triton's interpreter where there is no GPU; the choice is made once, before Triton loads."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def on_device(device: str):
    """Every new tensor is there."""
    with torch.device(device):
        yield

"""What only a GPU can show: `pytest -m gpu tests/gpu`. Without one everything here is skipped and says why."""

import pytest
import torch

from strainer_fast.ops.dispatch import triton_missing


@pytest.fixture(autouse=True, scope="session")
def _gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    why = triton_missing(torch.device("cuda"))
    if why is not None:
        pytest.skip(why)
    from strainer_fast.kernels.chip import is_interpreted

    if is_interpreted():
        pytest.skip("Triton was loaded in interpreter mode: start without TRITON_INTERPRET")

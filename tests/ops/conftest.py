"""The one-pass engines, each in turn: PyTorch's calls, and the native engine at every level this CPU has."""

from collections.abc import Iterator

import pytest

from strainer_fast.kernels import cpu


@pytest.fixture(params=["tiled", *cpu.LEVELS])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    """An implementation's name; within the test its level is forced."""
    if request.param == "tiled":
        yield "tiled"
    elif request.param not in cpu.available():
        pytest.skip(f"not run: no {request.param} here ({cpu.missing() or 'the CPU lacks it'})")
    else:
        with cpu.forced(request.param):
            yield "native"

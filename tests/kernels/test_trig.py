"""The range-reduced sine and cosine against float64."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from strainer_fast.kernels.trig import launch_sincos

ERROR = 2e-7  # the accuracy that kernels/trig.py states
REDUCED_ERROR = 1e-6  # by range reduction and the special-function unit, or Triton's sine in its place
ROOT = Path(__file__).parents[2]


def run(x: torch.Tensor, block: int = 1024, precision: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    sine, cosine = torch.full_like(x, math.nan), torch.full_like(x, math.nan)
    launch_sincos(x, sine, cosine, block=block, precision=precision)
    return sine, cosine


@pytest.mark.parametrize(("precision", "bound"), [("fp32", ERROR), ("fp16", REDUCED_ERROR)], ids=["exact", "reduced"])
@pytest.mark.parametrize("reach", [1.0, 30.0, 200.0, 1e4], ids=lambda r: f"up_to_{r:g}")
def test_error_against_float64(reach: float, precision: str, bound: float, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = ((torch.rand(20_000, generator=generator) * 2 - 1) * reach).to(device)
    sine, cosine = run(x, block=8192, precision=precision)
    assert (sine.double() - x.double().sin()).abs().max() <= bound
    assert (cosine.double() - x.double().cos()).abs().max() <= bound


def test_multiples_of_half_pi(device: str) -> None:
    # Both ends of the reduced interval and next to zero: a wrong multiple would show as a wrong sign.
    x = (torch.arange(-200, 201, dtype=torch.float64) * (math.pi / 2)).float().to(device)
    x = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)])
    sine, cosine = run(x)
    assert (sine.double() - x.double().sin()).abs().max() <= ERROR
    assert (cosine.double() - x.double().cos()).abs().max() <= ERROR


def test_identities(device: str) -> None:
    x = torch.linspace(0, 100, 1001, device=device)
    sine, cosine = run(x)
    mirrored_sine, mirrored_cosine = run(-x)
    torch.testing.assert_close(mirrored_sine, -sine, rtol=0, atol=0)
    torch.testing.assert_close(mirrored_cosine, cosine, rtol=0, atol=0)
    assert sine.abs().max() <= 1 + ERROR
    torch.testing.assert_close(sine**2 + cosine**2, torch.ones_like(x), rtol=0, atol=3 * ERROR)


@pytest.mark.parametrize("precision", ["fp32", "tf32x3", "tf32"])
def test_nan_and_infinity_give_nan(precision: str, device: str) -> None:
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0], device=device)
    with np.errstate(invalid="ignore"):  # the interpreter computes with numpy
        sine, cosine = run(x, precision=precision)
    assert sine.isnan().tolist() == [True, True, True, False]
    assert cosine.isnan().tolist() == [True, True, True, False]


@pytest.mark.parametrize("size", [0, 1, 1023, 1025])
def test_sizes_and_nothing_written_outside(size: int, device: str) -> None:
    guarded = torch.full((size + 64,), math.nan, device=device)
    x = torch.linspace(-3, 3, size, device=device)
    sine, cosine = guarded[32 : 32 + size], torch.empty(size, device=device)
    launch_sincos(x, sine, cosine)
    torch.testing.assert_close(sine, x.sin())
    assert guarded[:32].isnan().all()
    assert guarded[32 + size :].isnan().all()


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4, dtype=torch.float64), torch.zeros(4, 2)[:, 0], torch.zeros(5)],
    ids=["dtype", "strides", "shape"],
)
def test_unusable_tensors_are_refused(x: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected a contiguous float32 tensor .* Convert it"):
        launch_sincos(torch.zeros(4), torch.zeros(4), x)


def test_global_name_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "strainer_fast.kernels" in done.stderr

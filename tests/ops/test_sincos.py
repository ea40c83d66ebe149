"""The sweep's own sine and cosine against float64."""

import math

import pytest
import torch

from strainer_fast.ops.sincos import sincos_

ERROR = 2.5e-7  # what ops/sincos.py states


def run(z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    cosine, sine = z.clone(), torch.full_like(z, math.nan)
    sincos_(cosine, sine, (torch.full_like(z, math.nan), torch.full_like(z, math.nan)))
    return sine, cosine


@pytest.mark.parametrize("reach", [1.0, 30.0, 1000.0, 1e4])
@pytest.mark.parametrize("size", [100_003, 7])
def test_error_against_float64(reach: float, size: int) -> None:
    z = (torch.rand(size) * 2 - 1) * reach
    sine, cosine = run(z)
    assert (sine.double() - z.double().sin()).abs().max() <= ERROR
    assert (cosine.double() - z.double().cos()).abs().max() <= ERROR


def test_around_multiples_of_half_pi() -> None:
    z = (torch.arange(-400, 401, dtype=torch.float64) * (math.pi / 2)).float()
    z = torch.cat([z, torch.nextafter(z, z + 1), torch.nextafter(z, z - 1)])
    sine, cosine = run(z)
    assert (sine.double() - z.double().sin()).abs().max() <= ERROR
    assert (cosine.double() - z.double().cos()).abs().max() <= ERROR


def test_identities() -> None:
    z = torch.linspace(0, 100, 1001)
    (sine, cosine), (mirrored_sine, mirrored_cosine) = run(z), run(-z)
    assert torch.equal(mirrored_sine, -sine)
    assert torch.equal(mirrored_cosine, cosine)
    torch.testing.assert_close(sine**2 + cosine**2, torch.ones_like(z), rtol=0, atol=3 * ERROR)


def test_nan_and_infinity_give_nan() -> None:
    sine, cosine = run(torch.tensor([math.nan, math.inf, -math.inf, 0.0]))
    assert sine.isnan().tolist() == cosine.isnan().tolist() == [True, True, True, False]


def test_float64_is_pytorchs() -> None:
    z = torch.randn(100, dtype=torch.float64) * 50
    sine, cosine = run(z)
    assert torch.equal(sine, z.sin())
    assert torch.equal(cosine, z.cos())

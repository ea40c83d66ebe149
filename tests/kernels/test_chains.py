"""All layers of a network in one launch: what layers one by one give."""

import math

import pytest
import torch
from torch import Tensor

from strainer_fast.kernels.chains import can_chain, launch_forward_chain, launch_gradient_chain
from strainer_fast.kernels.segments import DTYPES
from strainer_fast.kernels.tiles import Tiles
from tests.kernels.guards import UNIT, Guards, relative

pytestmark = pytest.mark.usefixtures("on_device")

TILES = Tiles(32, 16, 16, 4, 2)
WIDTH, LAYERS, ROWS, POINTS = 16, 3, 64, 50


def weights(networks: int, precision: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """First layer, hidden layers: arguments of a few radians."""
    torch.manual_seed(0)
    w = torch.randn(LAYERS, networks, WIDTH, WIDTH) / math.sqrt(WIDTH / 8)
    return (
        3 * torch.randn(networks, WIDTH, 2),
        torch.randn(networks, WIDTH),
        w.to(DTYPES[precision]),
        torch.randn(LAYERS, networks, WIDTH),
    )


@pytest.mark.parametrize(
    ("precision", "networks", "keeps"), [*((p, 3, True) for p in DTYPES), ("fp16", 1, True), ("fp16", 3, False)]
)
def test_forward(precision: str, networks: int, keeps: bool) -> None:
    first_w, first_b, w, b = weights(networks, precision)
    x, guards = torch.rand(POINTS, 2) * 2 - 1, Guards()
    h = guards(LAYERS + 1, networks, ROWS, WIDTH, dtype=DTYPES[precision])
    c = guards(LAYERS, networks, ROWS, WIDTH, dtype=DTYPES[precision]) if keeps else None
    launch_forward_chain(x, (first_w, first_b), w, b, h, c, precision=precision, tiles=TILES)
    guards.check()
    padded = torch.cat([x, torch.zeros(ROWS - POINTS, 2)]).double()
    want = torch.sin(padded @ first_w.double().mT + first_b.double().unsqueeze(1))
    bound = 32 * UNIT[precision] + 3e-6
    assert relative(h[0], want) <= bound
    for i in range(LAYERS):  # each layer from what the one before left
        z = h[i].double() @ w[i].double().mT + b[i].double().unsqueeze(1)
        assert relative(h[i + 1], z.sin()) <= bound
        assert c is None or relative(c[i], z.cos()) <= bound


@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("networks", [1, 3])
def test_backward(precision: str, networks: int) -> None:
    *_, w, _ = weights(networks, precision)
    if precision == "tf32":  # stored the other way round, as the matrix unit reads them
        w = w.mT.contiguous().mT
    guards = Guards()
    dz = guards(LAYERS, networks, ROWS, WIDTH, dtype=DTYPES[precision])
    c = (torch.rand(LAYERS, networks, ROWS, WIDTH) * 2 - 1).to(DTYPES[precision])
    last = torch.randn(networks, ROWS, WIDTH).to(DTYPES[precision])
    dz[-1] = last
    launch_gradient_chain(dz, w, c, precision=precision, tiles=TILES)
    guards.check()
    assert torch.equal(dz[-1], last)
    for i in range(LAYERS - 1, 0, -1):
        want = dz[i].double() @ w[i].double() * c[i - 1].double()
        assert relative(dz[i - 1], want) <= 8 * UNIT[precision] + 3e-6


def test_what_does_not_fit_is_said() -> None:
    first_w, first_b, w, b = weights(1, "fp32")
    x, h = torch.zeros(POINTS, 2), torch.zeros(LAYERS + 1, 1, ROWS, WIDTH)
    with pytest.raises(ValueError, match="h: expected 32 units and whole blocks of 32 rows, got 16 and 64"):
        launch_forward_chain(x, (first_w, first_b), w, b, h, None, tiles=Tiles(32, 32, 16))
    with pytest.raises(ValueError, match="dz: expected 16 units and whole blocks of 128 rows"):
        launch_gradient_chain(h[1:], w, h[1:], tiles=Tiles(128, 16, 16))
    assert not can_chain("forward", 1000, WIDTH, 1, "fp32")  # no whole blocks

"""The sine layer's kernels against float64: edges, strides, networks, precisions, and nothing written outside."""

import math

import pytest
import torch
from torch import Tensor

from strainer_fast.kernels.layers import (
    launch_forward,
    launch_input_gradient,
    launch_slope,
    launch_weight_gradient,
)
from strainer_fast.kernels.mm import PRECISIONS
from strainer_fast.kernels.tiles import Tiles
from tests.kernels.guards import UNIT

BIG = Tiles(128, 64, 64)  # the interpreter pays per operation, not per number

pytestmark = pytest.mark.usefixtures("on_device")


def guarded(*shape: int) -> tuple[Tensor, Tensor]:
    """A contiguous tensor of NaN, and the memory round it."""
    memory = torch.full((math.prod(shape) + 64,), math.nan)
    return memory[32 : 32 + math.prod(shape)].view(shape), memory


def untouched(memory: Tensor) -> bool:
    return bool(memory[:32].isnan().all() and memory[-32:].isnan().all())


def problem(num: int, points: int, inputs: int, outputs: int, shared: bool) -> tuple[Tensor, ...]:
    """x, w, b, dy with z of the size that SIREN's rules give."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device="cpu").to(torch.empty(0).device) * 2 - 1

    x = uniform(points, inputs) if shared else uniform(num, points, inputs)
    return (
        x,
        uniform(num, outputs, inputs) * math.sqrt(6 / inputs) / 10,
        uniform(num, outputs),
        uniform(num, points, outputs),
    )


def truth(x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor, omega: float) -> dict[str, Tensor]:
    x, w, dy = x.double(), w.double(), dy.double()
    x = x if x.ndim == 3 else x.expand(w.shape[0], *x.shape)
    z = omega * (x @ w.mT + (0 if b is None else b.double().unsqueeze(1)))
    dz = omega * z.cos() * dy
    return {"y": z.sin(), "z": z, "dz": dz, "dx": dz @ w, "dw": dz.mT @ x, "db": dz.sum(1)}


def run(
    x: Tensor, w: Tensor, b: Tensor | None, dy: Tensor, omega: float, precision: str, tiles: Tiles, splits: int
) -> dict[str, Tensor]:
    num, outputs, inputs = w.shape
    points = x.shape[-2]
    y, around_y = guarded(num, points, outputs)
    z, around_z = guarded(num, points, outputs)
    dz, around_dz = guarded(num, points, outputs)
    dx, around_dx = guarded(num, points, inputs)
    dw, around_dw = guarded(splits, num, outputs, inputs)
    db, around_db = guarded(splits, num, outputs)
    launch_forward(x, w, b, y, z, omega=omega, precision=precision, tiles=tiles)
    launch_slope(dy, z, dz, omega=omega, tiles=tiles)
    launch_input_gradient(dz, w, dx, precision=precision, tiles=tiles)
    launch_weight_gradient(dz, x, dw, db, precision=precision, tiles=tiles)
    for memory in (around_y, around_z, around_dz, around_dx, around_dw, around_db):
        assert untouched(memory)
    return {"y": y, "z": z, "dz": dz, "dx": dx, "dw": dw.sum(0), "db": db.sum(0)}


def assert_close(ours: dict[str, Tensor], exact: dict[str, Tensor], precision: str, omega: float, inputs: int) -> None:
    """By norm: a few units in the last place of the operands; z also by its own size, which the sine passes on."""
    unit = UNIT["fp32"] if inputs <= 4 else UNIT[precision]
    phase = 4 * max(unit, 2.0**-24) * float(exact["z"].abs().max()) if exact["z"].numel() else 0.0
    for name, want in exact.items():
        got = ours[name].double()
        assert got.shape == want.shape
        limit = 8 * UNIT[precision] + phase + 1e-6
        assert float((got - want).norm()) <= limit * max(float(want.norm()), 1e-12), name


SIZES = {
    "width": [(2, 17, n, n) for n in (1, 3, 16, 33, 64, 100, 178, 256, 512)],
    "points": [(1, n, 33, 20) for n in (0, 1, 17, 127, 128, 129, 255, 256, 257, 1000)],
    "inputs": [(2, 40, n, 20) for n in (1, 2, 3, 4, 5)],
    "networks": [(n, 20, 8, 8) for n in (1, 5)],
}


@pytest.mark.parametrize("size", [s for sizes in SIZES.values() for s in sizes], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_sizes(size: tuple[int, int, int, int], shared: bool) -> None:
    x, w, b, dy = problem(*size, shared)
    assert_close(run(x, w, b, dy, 30.0, "fp32", BIG, 2), truth(x, w, b, dy, 30.0), "fp32", 30.0, size[2])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str) -> None:
    x, w, b, dy = problem(1, 100, 64, 64, False)
    assert_close(run(x, w, b, dy, 10.0, precision, BIG, 1), truth(x, w, b, dy, 10.0), precision, 10.0, 64)


def test_a_rounded_precision_is_less_exact() -> None:
    x, w, b, dy = problem(1, 100, 64, 64, False)
    exact = truth(x, w, b, dy, 10.0)["z"]
    errors = [float((run(x, w, b, dy, 10.0, p, BIG, 1)["z"] - exact).norm()) for p in ("fp32", "tf32", "bf16")]
    assert 100 * errors[0] < errors[1] < errors[2]


def test_three_products_leave_out_the_smallest() -> None:
    """Of (1 + d)^2 with d below tf32's last bit: 1 + 2 d is there, d^2 is not, which float32 would see."""
    d = 0.4375 * 2.0**-10  # a few bits, so that both parts are exact
    x, w, y = torch.zeros(1, 16, 16), torch.zeros(1, 16, 16), torch.zeros(1, 16, 16)
    x[0, 0, 0] = w[0, 0, 0] = 1 + d
    for precision, want in (("fp32", (1 + d) ** 2), ("tf32x3", 1 + 2 * d), ("tf32", 1.0)):
        launch_forward(x, w, None, y, omega=1.0, sine=False, precision=precision, tiles=Tiles(16, 16, 16))
        assert abs(float(y[0, 0, 0]) - want) <= 2.0**-24, precision


@pytest.mark.parametrize("inputs", [16, 1000])
def test_three_products_are_right_to_their_bound(inputs: int) -> None:
    """Element by element: 2^-21 of the sum of |x| |w|, and some units of float32 for sums, whose rounding averages."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 64, inputs), torch.randn(1, 32, inputs)
    y = torch.empty(1, 64, 32)
    launch_forward(x, w, None, y, omega=1.0, sine=False, precision="tf32x3", tiles=Tiles(64, 32, 64))
    size = x.double().abs() @ w.double().abs().mT
    assert bool(((y - x.double() @ w.double().mT).abs() <= (2.0**-21 + 4 * 2.0**-24) * size).all())


def test_strides_and_no_bias() -> None:
    x, w, _, dy = problem(2, 30, 20, 10, False)
    strided = [t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in (x, w, dy)]
    ours = run(*strided[:2], None, strided[2], 30.0, "fp32", BIG, 1)
    assert_close(ours, truth(x, w, None, dy, 30.0), "fp32", 30.0, 20)
    expanded = w[:1].expand(2, -1, -1)
    assert_close(run(x, expanded, None, dy, 30.0, "fp32", BIG, 1), truth(x, expanded, None, dy, 30.0), "fp32", 30.0, 20)


@pytest.mark.parametrize("tiles", [Tiles(16, 16, 16), Tiles(64, 32, 128)], ids=str)
def test_tiles_only_change_the_rounding(tiles: Tiles) -> None:
    x, w, b, dy = problem(1, 50, 33, 20, False)
    assert_close(run(x, w, b, dy, 30.0, "fp32", tiles, 3), truth(x, w, b, dy, 30.0), "fp32", 30.0, 33)


def test_the_cosine_in_the_epilogue() -> None:
    x, w, b, dy = problem(2, 40, 20, 10, False)
    exact = truth(x, w, b, dy, 30.0)
    cosine = torch.rand(2, 40, 20) * 2 - 1
    out, memory = guarded(2, 40, 20)
    launch_input_gradient(exact["dz"].float(), w, out, cosine, tiles=BIG)
    assert untouched(memory)
    want = cosine.double() * exact["dx"]
    assert float((out - want).norm()) <= 1e-5 * float(want.norm())


def test_same_bits_every_time_and_linear_output() -> None:
    x, w, b, dy = problem(2, 70, 20, 10, True)
    first, second = (run(x, w, b, dy, 30.0, "fp32", BIG, 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.values(), second.values(), strict=True))
    y = torch.full((2, 70, 10), math.nan)
    launch_forward(x, w, b, y, omega=1.0, sine=False, tiles=BIG)
    torch.testing.assert_close(y, x @ w.mT + b.unsqueeze(1))

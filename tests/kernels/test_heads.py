"""Heads with their loss against float64: shared and own features, weights, many columns, waves, nothing outside."""

import pytest
import torch
from torch import Tensor

from strainer_fast.kernels import heads as k
from strainer_fast.kernels.layers import launch_input_gradient, launch_weight_gradient
from strainer_fast.kernels.mm import PRECISIONS
from strainer_fast.kernels.segments import DTYPES
from strainer_fast.kernels.tiles import Tiles
from tests.kernels.guards import UNIT, Guards, relative

pytestmark = pytest.mark.usefixtures("on_device")


def problem(networks: int, heads: int, rows: int, points: int, width: int, channels: int) -> dict[str, Tensor]:
    """Features as sines and cosines of the same arguments, SIREN-like weights, one scale per signal."""
    z = torch.randn(networks, rows, width)
    signals = networks * heads
    return {
        "h": z.sin(),
        "cosine": z.cos(),
        "w": (torch.rand(networks, heads * channels, width) - 0.5) / width**0.5,
        "b": torch.rand(networks, heads * channels) - 0.5,
        "values": torch.rand(signals, points, channels),
        "scale": torch.rand(signals) + 0.5,
    }


def truth(given: dict[str, Tensor], weights: Tensor | None) -> dict[str, Tensor]:
    h, cosine, w, b, values, scale = (t.double() for t in given.values())
    networks, columns, _ = w.shape
    signals, points, channels = values.shape
    prediction = h[:, :points] @ w.mT + b.unsqueeze(1)  # [N, P, heads * C]
    target = values.view(networks, signals // networks, points, channels).transpose(1, 2)
    target = target.reshape(networks, points, columns)
    r = prediction - target
    weight = torch.ones(signals, points).double() if weights is None else weights.double().expand(signals, points)
    each = weight.view(networks, signals // networks, points).transpose(1, 2).repeat_interleave(channels, dim=2)
    g = r * each * scale.view(networks, 1, signals // networks).repeat_interleave(channels, dim=2)
    dz = torch.zeros_like(h)
    dz[:, :points] = (g @ w) * cosine[:, :points]
    return {"sums": (r * r * each).sum(1), "dz": dz, "dw": g.mT @ h[:, :points], "db": g.sum(1)}


def run(
    given: dict[str, Tensor], weights: Tensor | None, precision: str, splits: int, tiles: Tiles | None = None
) -> dict[str, Tensor]:
    guards = Guards()
    dtype = DTYPES[precision]
    h, cosine, w = (given[n].to(dtype) for n in ("h", "cosine", "w"))
    networks, rows, width = h.shape
    columns = w.shape[1]
    out = {
        "sums": guards(splits, networks, columns),
        "dz": guards(networks, rows, width, dtype=dtype),
        "dw": guards(splits, networks, columns, width),
        "db": guards(splits, networks, columns),
    }
    k.launch_heads_loss(
        h, w, given["b"], given["values"], given["scale"], out["sums"], point_weights=weights, cosine=cosine,
        dz=out["dz"], dw=out["dw"], db=out["db"], precision=precision, tiles=tiles,
    )  # fmt: skip
    guards.check()
    return {name: t if name == "dz" else t.sum(0) for name, t in out.items()}


SIZES = {
    "one": (1, 1, 64, 64, 32, 1),
    "ten_heads_of_three": (1, 10, 70, 65, 48, 3),
    "own": (3, 1, 40, 33, 64, 3),
    "odd_width": (2, 2, 33, 33, 20, 2),
    "one_point": (1, 2, 16, 1, 16, 1),
    "no_points": (1, 2, 16, 0, 16, 1),
    "wide": (1, 3, 32, 32, 256, 1),
}


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("weighted", [False, True])
def test_sums_and_gradients(size: tuple[int, ...], weighted: bool) -> None:
    given = problem(*size)
    weights = torch.rand(size[0] * size[1], size[3]) if weighted else None
    want = truth(given, weights)
    for name, got in run(given, weights, "fp32", 2, Tiles(32, 32, 256)).items():
        assert relative(got, want[name]) <= 2e-6, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str) -> None:
    given = problem(1, 5, 100, 100, 64, 3)
    want = truth(given, None)
    for name, got in run(given, None, precision, 1).items():
        assert relative(got, want[name]) <= 8 * UNIT[precision] + 2e-6, name


def test_weights_shared_by_stride_zero_and_strided_values() -> None:
    given = problem(1, 3, 40, 40, 16, 2)
    given["values"] = given["values"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    mask = (torch.rand(40) > 0.5).float().expand(3, 40)
    want = truth(given, mask)
    for name, got in run(given, mask, "fp32", 1).items():
        assert relative(got, want[name]) <= 2e-6, name


def test_add_joins_two_waves() -> None:
    given = problem(1, 2, 48, 48, 16, 1)
    want = truth(given, None)
    sums, dw, db = torch.zeros(2, 1, 2), torch.zeros(2, 1, 2, 16), torch.zeros(2, 1, 2)
    for start in (0, 32):
        part = slice(start, start + 32)
        k.launch_heads_loss(
            given["h"][:, part], given["w"], given["b"], given["values"][:, part], given["scale"], sums, dw=dw, db=db,
            add=start > 0,
        )  # fmt: skip
    for name, got in (("sums", sums), ("dw", dw), ("db", db)):
        assert relative(got.sum(0), want[name]) <= 2e-6, name


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_many_columns_go_through_residuals(precision: str) -> None:
    given = problem(1, 50, 100, 90, 64, 1)
    want, guards, dtype = truth(given, None), Guards(), DTYPES[precision]
    h, cosine, w = (given[n].to(dtype) for n in ("h", "cosine", "w"))
    g = guards(1, 100, 64, dtype=dtype)
    sums = guards(k.heads_splits(100, 1, 50, 64, precision, fused=False), 1, 50)
    k.launch_residual(h, w, given["b"], given["values"], given["scale"], sums, g, precision=precision)
    assert (g[:, :, 50:] == 0).all()
    dz, dw, db = guards(1, 100, 64, dtype=dtype), guards(2, 1, 50, 64), guards(2, 1, 50)
    launch_input_gradient(g[:, :, :50], w, dz, cosine, operand=True, precision=precision)
    launch_weight_gradient(g[:, :, :50], h, dw, db, precision=precision)
    guards.check()
    for name, got in (("sums", sums.sum(0)), ("dz", dz), ("dw", dw.sum(0)), ("db", db.sum(0))):
        assert relative(got, want[name]) <= 8 * UNIT[precision] + 2e-6, name


def test_losses_and_the_flag() -> None:
    sums = torch.rand(70, 2, 6)
    sums[3, 1, 2] = torch.nan
    norm, losses, bad = torch.full((4,), 5.0), torch.full((4,), torch.nan), torch.zeros(4, dtype=torch.int32)
    k.launch_losses(sums, norm, losses, bad)
    want = sums.double().sum(0).view(4, 3).sum(1) / 5
    torch.testing.assert_close(losses.double(), want, equal_nan=True)
    assert bad.tolist() == [0, 0, 1, 0]
    coupled = torch.zeros(1, dtype=torch.int32)
    k.launch_losses(sums, norm, losses, coupled)
    assert coupled.item() == 1


def test_unusable_tensors_are_refused() -> None:
    given = problem(1, 50, 16, 16, 16, 1)
    sums = torch.zeros(1, 1, 50)
    arguments = [given[n] for n in ("h", "w", "b", "values", "scale")]
    with pytest.raises(ValueError, match=r"at most 32 columns, got 50\. Use launch_residual"):
        k.launch_heads_loss(*arguments, sums)
    with pytest.raises(ValueError, match="a signal per head, a channel per column"):
        k.launch_residual(*arguments[:3], torch.zeros(3, 16, 1), given["scale"], sums, torch.zeros(1, 16, 50))
    with pytest.raises(ValueError, match="Ask heads_splits"):
        k.launch_residual(*arguments, sums, torch.zeros(1, 16, 20))

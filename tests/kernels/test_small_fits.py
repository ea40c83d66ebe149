"""Whole small fits by one kernel against the contract written down in PyTorch and float64."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from strainer_fast.kernels.mm import PRECISIONS
from strainer_fast.kernels.segments import DTYPES
from strainer_fast.kernels.small_fits import (
    Fits,
    Layout,
    launch_small_fits,
    layout_of,
    small_fits_scratch,
    unfit,
)
from strainer_fast.kernels.tiles import Tiles
from tests.kernels.guards import UNIT, Guards, relative

pytestmark = pytest.mark.usefixtures("on_device")

RUNNING, TARGET, BUDGET, NON_FINITE, DIVERGED = range(5)
OMEGAS = (20.0, 5.0, 3.0)
OVERFLOWS = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
"""The interpreter computes with NumPy, which warns of what is tested here."""

SMALL = Tiles(32, 64, 16, 4, 1)  # several tiles of points, two chunks of a weight gradient


def problem(layout: Layout, networks: int = 2, points: int = 70) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points, values, omegas and flat parameters as SIREN draws them."""
    torch.manual_seed(3)
    x, values = torch.rand(points, layout.inputs) * 2 - 1, torch.rand(networks, points, layout.channels)
    flat = torch.zeros(networks, layout.length)
    for i, view in enumerate(layout.views(flat)):
        fan = view.shape[-1] if view.ndim == 3 else layout.width
        view.uniform_(-1, 1)
        view *= 1 / layout.inputs if i < 2 else math.sqrt(6 / fan) / OMEGAS[min(i // 2, 2)]
    omegas = torch.tensor([*OMEGAS[: layout.hidden + 1], 1.0])
    return x, values, omegas, flat


def fresh(flat: Tensor, budget: int, guard: bool) -> Fits:
    networks = len(flat)

    def each(fill: float = 0, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.full((networks,), fill, dtype=dtype)

    integers = ("step", "adam_step", "rollbacks", "measured", "reason", "skipped")
    return Fits(
        parameters=flat.clone(),
        exp_avg=torch.zeros_like(flat),
        exp_avg_sq=torch.zeros_like(flat),
        best=flat.clone() if guard else None,
        scale=each(1, torch.float32),
        loss_scale=each(1, torch.float32),
        best_mse=each(math.inf, torch.float64),
        mse=torch.full((networks, budget + 1), math.nan),
        **{name: each() for name in integers},
    )


def run(
    x: Tensor, values: Tensor, omegas: Tensor, layout: Layout, fits: Fits, rates: Tensor, until: int | None = None,
    order: tuple[int, ...] | None = None, programs: int = 2, tiles: Tiles | None = None, precision: str = "fp32",
    target: float = -1.0, guard: float = 0.0, frozen: int = 0, check_every: int = 2,
    beta1: float = 0.9,
) -> Fits:  # fmt: skip
    guards, sizes = Guards(), small_fits_scratch(layout, programs, precision, tiles)
    gradients, scratch = guards(sizes[0]), guards(sizes[1], dtype=DTYPES[precision])
    launch_small_fits(
        x,
        values,
        layout,
        fits,
        omegas,
        rows=torch.tensor(range(len(values)) if order is None else order),
        queue=torch.zeros(1, dtype=torch.int32),
        until=len(rates) if until is None else until,
        learning_rates=rates,
        betas=(beta1, 0.999),
        eps=1e-8,
        check_every=check_every,
        target_mse=torch.full((len(values),), target, dtype=torch.float64),
        guard=guard,
        frozen=frozen,
        gradients=gradients,
        scratch=scratch,
        programs=programs,
        precision=precision,
        tiles=tiles,
    )
    guards.check()
    return fits


def values_of(x: Tensor, omegas: Tensor, layout: Layout, parameters: list[Tensor]) -> Tensor:
    """[N, P, C] of stacked networks in float64."""
    h = x.double().expand(len(parameters[0]), *x.shape)
    for i in range(layout.hidden + 1):
        h = torch.sin(float(omegas[i]) * (h @ parameters[2 * i].mT + parameters[2 * i + 1][:, None]))
    return h @ parameters[-2].mT + parameters[-1][:, None]


def expected(
    x: Tensor, values: Tensor, omegas: Tensor, layout: Layout, flat: Tensor, rates: Tensor, frozen: int = 0
) -> tuple[Tensor, Tensor]:
    """Losses [N, budget + 1] and parameters after the fit, of Adam in float64."""
    leaves = [view.double().clone().requires_grad_() for view in layout.views(flat)]
    adam = torch.optim.Adam(leaves[2 * frozen :], lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    losses = []
    for step in range(len(rates) + 1):
        mse = (values_of(x, omegas, layout, leaves) - values.double()).square().mean((1, 2))
        losses.append(mse.detach())
        if step < len(rates):
            adam.param_groups[0]["lr"] = float(rates[step])
            adam.zero_grad()
            mse.sum().backward()
            adam.step()
    return torch.stack(losses, 1), torch.cat([p.detach().flatten(1) for p in leaves], 1)


def gradient_error(tiles: Tiles, precision: str) -> float:
    """By norm, of the gradients of a network with a hidden layer: without momentum they are Adam's first moment."""
    layout = Layout(2, 16, 1, 3)
    x, values, omegas, flat = problem(layout, points=tiles.points + 1)
    rates = torch.zeros(1)
    fits = run(x, values, omegas, layout, fresh(flat, 1, False), rates, tiles=tiles, precision=precision, beta1=0.0)
    leaves = [view.double().requires_grad_() for view in layout.views(flat)]
    values_of(x, omegas, layout, leaves).sub(values.double()).square().mean((1, 2)).sum().backward()
    want = torch.cat([p.grad.flatten(1) for p in leaves if p.grad is not None], 1)
    return relative(fits.exp_avg[:, : layout.parameters], want)


LAYOUTS = [Layout(1, 5, 0, 1), Layout(2, 16, 2, 3), Layout(3, 33, 1, 2), Layout(4, 64, 1, 16)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda la: f"{la.inputs}-{la.width}x{la.hidden + 1}-{la.channels}")
def test_losses_and_weights_are_adams(layout: Layout) -> None:
    x, values, omegas, flat = problem(layout)
    rates = torch.linspace(2e-4, 1e-4, 8)
    fits = run(x, values, omegas, layout, fresh(flat, 8, False), rates, tiles=SMALL)
    losses, parameters = expected(x, values, omegas, layout, flat, rates)
    torch.testing.assert_close(fits.mse.double(), losses, rtol=1e-5, atol=0)
    # Adam divides by gradients that are near zero: where they are, float32 and float64 part.
    moved = (parameters - flat[:, : layout.parameters]).norm()
    assert float((fits.parameters[:, : layout.parameters] - parameters).norm() / moved) < 1e-3
    assert fits.step.tolist() == fits.adam_step.tolist() == [8, 8]
    assert fits.measured.tolist() == [9, 9]
    assert fits.reason.tolist() == [BUDGET, BUDGET]


def test_twenty_steps_in_float32() -> None:
    layout = Layout(2, 32, 2, 3)
    x, values, omegas, flat = problem(layout, points=50)
    rates = torch.full((20,), 1e-4)
    fits = run(x, values, omegas, layout, fresh(flat, 20, False), rates)
    losses, _ = expected(x, values, omegas, layout, flat, rates)
    torch.testing.assert_close(fits.mse.double(), losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_other_precisions_stay_near(precision: str) -> None:
    layout = Layout(2, 16, 1, 1)
    x, values, omegas, flat = problem(layout)
    rates = torch.full((6,), 1e-4)
    fits = run(x, values, omegas, layout, fresh(flat, 6, False), rates, precision=precision)
    losses, _ = expected(x, values, omegas, layout, flat, rates)
    bound = max(8 * UNIT[precision], 1e-5)  # at least that of fp32
    torch.testing.assert_close(fits.mse.double(), losses, rtol=bound, atol=0)
    assert fits.skipped.tolist() == [0, 0]
    moved = (fits.parameters != flat)[:, : layout.parameters]
    assert bool(moved.all())


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_frozen_layers_stay(frozen: int) -> None:
    layout = Layout(2, 16, 1, 2)
    x, values, omegas, flat = problem(layout)
    rates = torch.full((4,), 1e-3)
    fits = run(x, values, omegas, layout, fresh(flat, 4, False), rates, frozen=frozen, tiles=SMALL)
    still = layout.offsets[2 * frozen]
    assert torch.equal(fits.parameters[:, :still], flat[:, :still])
    assert torch.equal(fits.exp_avg[:, :still], torch.zeros_like(flat[:, :still]))
    if frozen < 3:
        losses, _ = expected(x, values, omegas, layout, flat, rates, frozen)
        torch.testing.assert_close(fits.mse.double(), losses, rtol=1e-5, atol=0)


def test_same_bits_for_any_queue_number_of_programs_and_calls() -> None:
    layout = Layout(2, 16, 1, 1)
    x, values, omegas, flat = problem(layout, networks=3)
    rates, given = torch.full((5,), 1e-2), {"tiles": SMALL, "guard": 1.2, "check_every": 1}
    whole = run(x, values, omegas, layout, fresh(flat, 5, True), rates, programs=1, **given)
    cut = fresh(flat, 5, True)
    for until, order, programs in ((0, (2, 0, 1), 3), (3, (1, 2, 0), 2), (5, (0, 2, 1), 1)):
        run(x, values, omegas, layout, cut, rates, until, order, programs, **given)
    for field in fields(Fits):
        assert torch.equal(getattr(whole, field.name), getattr(cut, field.name)), field.name


def test_a_target_is_looked_at_every_check() -> None:
    layout = Layout(2, 16, 1, 1)
    x, values, omegas, flat = problem(layout)
    rates = torch.full((7,), 1e-3)
    free = run(x, values, omegas, layout, fresh(flat, 7, False), rates)
    assert bool((free.mse.diff() < 0).all())
    target = float(free.mse[0, 3:5].double().mean())  # reached at step 4, a check
    fits = run(x, values, omegas, layout, fresh(flat, 7, False), rates, target=target)
    late = int((free.mse[1] <= target).nonzero()[0]) if bool((free.mse[1] <= target).any()) else 7
    late = min(7, late + late % 2)
    assert fits.step.tolist() == [4, late]
    assert fits.measured.tolist() == [5, late + 1]
    assert int(fits.reason[0]) == TARGET
    assert torch.equal(fits.mse[0, :5], free.mse[0, :5])
    # The next call finds it stopped where it is.
    again = run(x, values, omegas, layout, replace(fits), rates, target=target, order=(0,))
    assert int(again.step[0]) == 4 and int(again.reason[0]) == TARGET


@OVERFLOWS
def test_not_a_number_stops_at_the_last_finite_weights() -> None:
    layout = Layout(2, 16, 1, 1)
    x, values, omegas, flat = problem(layout)
    values[1, 5] = math.nan
    rates = torch.tensor([1e-3, 1e38, 1e-3])
    for cuts in ((3,), (1, 2, 3)):
        fits = fresh(flat, 3, False)
        for until in cuts:
            run(x, values, omegas, layout, fits, rates, until)
            if bool((fits.reason != RUNNING).all()):
                break
        assert fits.reason.tolist() == [NON_FINITE, NON_FINITE]
        assert fits.measured.tolist() == fits.step.tolist() == [2, 0]
        one = run(x, values, omegas, layout, fresh(flat, 1, False), rates[:1], order=(0,))
        assert torch.equal(fits.parameters[0], one.parameters[0])  # one good step
        assert torch.equal(fits.parameters[1], flat[1])


@OVERFLOWS
def test_a_guard_rolls_back_once_then_stops_at_the_best() -> None:
    layout = Layout(2, 16, 1, 1)
    x, values, omegas, flat = problem(layout)
    rates = torch.tensor([1e-3, 5.0, 1e-3, 1e-3, 1e38, 1e-3])
    fits = run(x, values, omegas, layout, fresh(flat, 6, True), rates, guard=2.0, check_every=1)
    assert fits.reason.tolist() == [DIVERGED, DIVERGED]
    assert fits.rollbacks.tolist() == [1, 1]
    assert fits.scale.tolist() == [0.5, 0.5]
    # Step 2 spikes and is used up; step 3 begins anew with half the rate.
    assert fits.step.tolist() == [5, 5]
    assert fits.adam_step.tolist() == [2, 2]
    assert torch.equal(fits.mse[:, 3], fits.mse[:, 1])
    assert torch.equal(fits.parameters, fits.best)
    assert torch.equal(fits.best_mse.float(), fits.mse[:, :5].amin(1))
    small = run(x, values, omegas, layout, fresh(flat, 1, False), torch.tensor([1e-3]))
    start, view = small.parameters, fits.mse[:, 4]
    half = run(x, values, omegas, layout, fresh(start, 1, False), torch.tensor([0.5e-3]))
    assert torch.equal(half.mse[:, 1], view)


@OVERFLOWS
def test_gradients_that_overflow_skip_the_step_and_lower_the_scale() -> None:
    layout = Layout(2, 16, 1, 1)
    x, values, omegas, flat = problem(layout)
    values[0] = 60000.0  # residuals that are finite in fp16, gradients that are not
    values[0, ::2] = -60000.0
    rates = torch.full((4,), 1e-3)
    fits = run(x, values, omegas, layout, fresh(flat, 4, False), rates, precision="fp16")
    assert fits.reason.tolist() == [BUDGET, BUDGET]
    skipped = int(fits.skipped[0])
    assert 0 < skipped < 4
    assert float(fits.loss_scale[0]) == 16.0**-skipped
    assert fits.adam_step.tolist() == [4 - skipped, 4]
    assert torch.equal(fits.mse[0, : skipped + 1], fits.mse[0, :1].expand(skipped + 1))
    assert float(fits.mse[0, -1]) < float(fits.mse[0, 0])
    assert int(fits.skipped[1]) == 0


def test_what_does_not_fit_is_named() -> None:
    assert unfit(2, 32, 4, 3, "fp32") is None
    assert unfit(5, 32, 4, 3, "fp32") == "5 coordinates, above 4"
    assert unfit(2, 32, 4, 17, "fp32") == "17 channels, above 16"
    assert unfit(2, 32, 1, 3, "fp32") == "networks without a sine layer"
    assert unfit(2, 65, 4, 3, "fp16") == "width 65 in fp16 does not fit a block"
    layout = Layout(2, 16, 1, 1)
    x, values, omegas, flat = problem(layout)
    assert layout_of(layout.views(flat)) == layout
    with pytest.raises(ValueError, match="equally wide sine layers"):
        layout_of([torch.zeros(1, 16, 2), torch.zeros(1, 16), torch.zeros(1, 8, 16), torch.zeros(1, 8),
                   torch.zeros(1, 1, 8), torch.zeros(1, 1)])  # fmt: skip
    with pytest.raises(ValueError, match=r"mse: expected shape \[2, 5\], got \[2, 4\]"):
        run(x, values, omegas, layout, fresh(flat, 3, False), torch.zeros(4))
    with pytest.raises(ValueError, match=r"values: expected shape \[2, 70, 1\]"):
        run(x, values[..., :0], omegas, layout, fresh(flat, 3, False), torch.zeros(3))

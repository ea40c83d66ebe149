"""K-FAC's steps on the Triton kernels: those of the optimiser in PyTorch's calls, decided without the host."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast.fitting.kfac import Kfac
from strainer_fast.fitting.stepper import Stepper
from strainer_fast.fitting.steppers import make_stepper
from strainer_fast.fitting.triton_kfac import TritonKfacStepper
from tests.kernels.guards import relative
from tests.ops_triton.test_steps import ARCHITECTURE, Counting, kernels, losses, scans

KINDS = pytest.mark.parametrize("kind", ["stack", "heads", "features"])
STEPS = 5


def stepper(implementation: str, kind: str = "stack", precision: str = "fp32", **changes: object) -> Stepper:
    """Three signals: networks of their own, heads of one encoder, networks on 24 features of frozen layers."""
    generator = torch.Generator().manual_seed(0)
    inputs = 24 if kind == "features" else 2
    model = sf.Strainer(inputs, 16, 4, 2, 3, 3) if kind == "heads" else sf.BatchedSiren(3, inputs, 16, 4, 2)
    model.reset_parameters(generator)
    layers = [*(model.encoder.layers if kind == "heads" else model.layers), model.head]
    parameters = [p.detach().clone().requires_grad_() for layer in layers for p in (layer.weight, layer.bias)]
    points = sf.signals.grid((14, 14))
    if kind == "features":
        points = 0.2 * torch.sin(3 * points @ torch.randn(2, inputs, generator=generator))
    values = torch.rand(3, len(points), 2, generator=generator)
    # Shorter steps than those of fits, where rounding decides which of the first ones are taken back.
    recipe = sf.recipe("fast", **{"learning_rate": 0.003, "damping": 1.0, "refresh_every": 3} | changes)
    omegas = [30.0, 20.0, 10.0]
    kfac = Kfac(parameters, recipe, None if kind == "heads" else 3, points, omegas)
    how = {"implementation": implementation, "precision": precision, "independent": kind != "heads", "keep": True}
    return make_stepper(points, values, parameters, omegas, kfac, **how)


def run(ours: Stepper, steps: int = STEPS) -> Tensor:
    """Losses before each step."""
    told = []
    for step in range(steps):
        told.append(ours.evaluate(step, True).clone())
        ours.update()
    return torch.stack(told)


@pytest.mark.parametrize(
    ("kind", "momentum"), [("stack", None), ("stack", 0.7), ("heads", None), ("features", None)], ids=str
)
def test_steps_equal_plain_ones(kind: str, momentum: float | None) -> None:
    ours, plain = (stepper(i, kind, momentum=momentum) for i in ("triton", "tiled"))
    assert isinstance(ours, TritonKfacStepper) and type(plain) is Stepper
    found, expected = run(ours), run(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert (expected[-1] < expected[0]).all()
    for a, b in zip(ours.parameters, plain.parameters, strict=True):
        assert relative(a.detach(), b.detach()) < 1e-4
    for name in ("rate", "left", "best"):
        torch.testing.assert_close(getattr(ours.optimiser, name), getattr(plain.optimiser, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["stack", "heads"])
def test_steps_that_raise_the_loss_are_taken_back(kind: str) -> None:
    """Steps far too long: losses as told never rise, and weights and gradients of the last good ones come back."""
    ours, plain = (stepper(i, kind) for i in ("triton", "tiled"))
    for each in (ours, plain):
        first = each.evaluate(0, True)
        each.optimiser.rate *= 2e5
        before = [p.detach().clone() for p in each.parameters]
        each.update()
        assert not torch.equal(each.parameters[0].detach(), before[0])
        assert torch.equal(each.evaluate(1, True), first)
        assert all(torch.equal(p.detach(), q) for p, q in zip(each.parameters, before, strict=True))
        assert (each.optimiser.rate == 1e5).all()
        each.optimiser.rate /= 1e5
        each.update()  # with the gradients that came back
    found, expected = run(ours), run(plain)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)
    assert (found[-1] < first).all()


def test_a_network_that_is_not_finite_is_told_so_and_its_neighbours_go_on() -> None:
    ours = stepper("triton")
    ours.values[1, 5] = math.inf
    with np.errstate(all="ignore"):  # the interpreter computes with numpy
        found, alone = run(ours), run(stepper("triton"))
    assert not found[:, 1].isfinite().any()
    assert torch.equal(found[:, [0, 2]], alone[:, [0, 2]])
    assert all(p.isfinite().all() for p in ours.last_finite())


def test_gradients_that_overflow_half_precision_are_said_and_mended() -> None:
    ours = stepper("triton", precision="fp16")
    ours.scale *= 2.0**16
    ours.pipeline.table.scales[:, 0] /= 2.0**16
    with np.errstate(all="ignore"), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        first = ours.evaluate(0, True)
        for step in range(3):
            ours.look()
            ours.update()
            ours.evaluate(step + 1, True)
    assert "gradients overflowed in fp16 and 3 networks skipped steps" in str(said[0].message)
    assert first.isfinite().all()  # a first loss is told though its gradient is of no use
    assert ours.lowered < 1
    assert (run(ours)[-1] < first).all()


def test_selected_and_joined_networks_step_as_before() -> None:
    whole, rest, alone = (stepper("triton") for _ in range(3))
    for each in (whole, rest, alone):
        run(each, 2)
        each.evaluate(2, True)
    rest, alone = rest.select(torch.tensor([0, 2])), alone.select(torch.tensor([1]))
    joined = rest.join(alone)
    for each in (whole, joined):
        each.update()
    a, b = whole.evaluate(3, True), joined.evaluate(3, True)
    assert torch.equal(a[[0, 2, 1]], b)
    for each in (whole, joined):
        each.update()
    torch.testing.assert_close(run(whole, 2)[:, [0, 2, 1]], run(joined, 2), rtol=1e-5, atol=0)


@KINDS
def test_a_step_asks_pytorch_for_products_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = stepper("triton", kind)
    run(ours, 1)
    for kernel in kernels():
        monkeypatch.setattr(type(kernel), "run", lambda self, *a, **k: None, raising=False)
    with Counting() as counting, torch.no_grad():
        ours._launch_gradients()
        ours._launch_update()
    # Two a shape of layer: first, hidden, head; features are as wide as no layer.
    assert counting.calls == {"aten.bmm.out": 6}


def test_a_fit_equals_the_cpus() -> None:
    recipe = sf.recipe("fast", steps=8, precision="fp32")
    ours, cpus = (
        sf.fit(scans(24)[:2], "siren", recipe, architecture=ARCHITECTURE, implementation=i) for i in ("triton", "tiled")
    )
    torch.testing.assert_close(losses(ours), losses(cpus), rtol=2e-3, atol=0)
    assert min(ours.psnr) > 20


@pytest.mark.long
@pytest.mark.parametrize("kind", ["brain-mri", "photos"])
def test_half_precision_ends_no_lower_on_real_images(kind: str) -> None:
    """The bound under which `auto` takes fp16 on a GPU, 0.1 dB; on the way there rounding decides which of two equally
    good steps is taken back, so that curves part and meet."""
    signal = sf.signals.samples(kind, size=48)[:1]
    exact, half = (
        sf.fit(signal, "siren", sf.recipe("fast", steps=12, precision=p), implementation="triton").psnr[0]
        for p in ("fp32", "fp16")
    )
    assert exact > 35
    assert half >= exact - 0.1

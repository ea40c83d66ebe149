"""Muon's steps on the Triton kernels: those of the optimiser in PyTorch's calls."""

import math

import numpy as np
import pytest
import torch

import strainer_fast as sf
from strainer_fast.fitting.muon import Muon
from strainer_fast.fitting.stepper import Stepper
from strainer_fast.fitting.steppers import make_stepper
from strainer_fast.fitting.triton_muon import TritonMuonStepper
from tests.kernels.guards import relative
from tests.ops_triton.test_kfac_steps import run
from tests.ops_triton.test_steps import Counting, kernels

KINDS = pytest.mark.parametrize("kind", ["stack", "heads", "deep heads", "features"])


def stepper(implementation: str, kind: str = "stack", precision: str = "fp32") -> Stepper:
    """Two signals: networks, heads of an encoder, decoders with a sine layer, networks behind frozen layers."""
    generator = torch.Generator().manual_seed(0)
    heads = kind.endswith("heads")
    inputs = 24 if kind == "features" else 2
    shared = 2 if kind == "deep heads" else 3
    model = sf.Strainer(inputs, 16, 4, 1, shared, 2) if heads else sf.BatchedSiren(2, inputs, 16, 4, 1)
    model.reset_parameters(generator)
    parameters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    points = sf.signals.grid((12, 12))
    if kind == "features":
        points = 0.2 * torch.sin(3 * points @ torch.randn(2, inputs, generator=generator))
    values = torch.rand(2, len(points), 1, generator=generator)
    recipe = sf.recipe("paper", optimiser="muon", learning_rate=2e-3, schedule="cosine", warmup_steps=2, steps=20)
    muon = Muon(parameters, recipe, None if heads else 2, int(kind == "features"))
    how = {"implementation": implementation, "precision": precision, "independent": not heads, "keep": True}
    return make_stepper(points, values, parameters, [30.0, 20.0, 10.0], muon, **how)


@KINDS
def test_steps_equal_plain_ones(kind: str) -> None:
    ours, plain = (stepper(i, kind) for i in ("triton", "tiled"))
    assert isinstance(ours, TritonMuonStepper) and type(plain) is Stepper
    torch.testing.assert_close(run(ours, 3), run(plain, 3), rtol=1e-4, atol=0)
    for a, b in zip(ours.parameters, plain.parameters, strict=True):
        assert relative(a.detach(), b.detach()) < 1e-3
    for name, state in plain.optimiser.state().items():
        torch.testing.assert_close(ours.optimiser.state()[name], state, rtol=1e-2, atol=1e-5)


def test_a_network_that_is_not_finite_stays_where_it_was_and_its_neighbour_goes_on() -> None:
    ours, alone = stepper("triton"), stepper("triton")
    ours.values[1, 5] = math.inf
    before = [p.detach()[1].clone() for p in ours.parameters]
    with np.errstate(all="ignore"):  # the interpreter computes with numpy
        found, expected = run(ours, 3), run(alone, 3)
    assert not found[:, 1].isfinite().any()
    assert torch.equal(found[:, 0], expected[:, 0])
    assert all(torch.equal(p.detach()[1], q) for p, q in zip(ours.last_finite(), before, strict=True))
    ours.look()
    assert ours.optimiser.step.tolist() == [3, 0]


def test_half_precision_follows_single() -> None:
    ours, exact = stepper("triton", precision="fp16"), stepper("triton")
    torch.testing.assert_close(run(ours, 3), run(exact, 3), rtol=0.02, atol=0)


def test_selected_and_joined_networks_step_as_before() -> None:
    whole, left, right = (stepper("triton") for _ in range(3))
    for each in (whole, left, right):
        run(each, 2)
        each.evaluate(2, True)
    joined = left.select(torch.tensor([1])).join(right.select(torch.tensor([0])))
    for each in (whole, joined):
        each.update()
    found, expected = (torch.stack([each.evaluate(3, True)]) for each in (joined, whole))
    torch.testing.assert_close(found, expected[:, [1, 0]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["stack", "heads"])
def test_a_step_asks_pytorch_for_one_number_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adam's learning rate."""
    ours = stepper("triton", kind)
    for kernel in kernels():
        monkeypatch.setattr(type(kernel), "run", lambda self, *a, **k: None, raising=False)
    with Counting() as counting, torch.no_grad():
        ours._launch_gradients()
        ours._launch_update()
    assert {name: n for name, n in counting.calls.items() if "split" not in name} == {"aten.mul.out": 1}

"""Looks that come a step late, as on a GPU, find and hand out the same as those that stop for every look."""

from typing import Any

import numpy as np
import pytest
import torch

import strainer_fast as sf
from strainer_fast.fitting import fitter, stack
from strainer_fast.fitting.triton_stepper import FlatStepper
from tests.ops_triton.test_steps import scans

SMALL = sf.Architecture(hidden_features=16, num_layers=3, num_shared_layers=2)
ADAM = {"learning_rate": 3e-3, "precision": "fp32"}
RECIPES = {
    "a target": ADAM | {"steps": 9, "target_psnr": 10.5, "check_every": 1},
    "every third step": ADAM | {"steps": 7, "target_psnr": 9.5, "check_every": 3},
    "a budget": ADAM | {"steps": 3, "check_every": 2},
    "kfac": {"optimiser": "kfac", "start": "least_squares", "learning_rate": 0.03, "steps": 4, "check_every": 1}
    | {"target_psnr": 13.0, "precision": "fp32"},
}


@pytest.mark.parametrize(
    ("name", "room"), [("a target", 2), ("every third step", 3), ("a budget", 2), ("kfac", 2)], ids=str
)
def test_they_find_the_same(name: str, room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sf.recipe("paper", **RECIPES[name])
    monkeypatch.setattr(fitter, "STACK_ELEMENTS", 64 * 16 * room)
    looks: list[list[tuple[int, list[int], list[float]]]] = []
    results = []
    for behind in (False, True):
        monkeypatch.setattr(FlatStepper, "can_look_behind", behind)
        seen: list[Any] = []

        def note(progress: sf.Progress, seen: list[Any] = seen) -> None:
            index = progress.running[0]
            weight = next(progress.module(index).parameters())
            seen.append((index, progress.done[0], float(weight.detach().double().sum())))

        how: dict[str, Any] = {"architecture": SMALL, "implementation": "triton", "on_check": note}
        results.append(sf.fit(scans(8)[:3], "siren", recipe, **how))
        looks.append(seen)
    stopped, lagged = results
    assert [(s.steps, s.stop_reason) for s in lagged.signals] == [(s.steps, s.stop_reason) for s in stopped.signals]
    if "target_psnr" in RECIPES[name]:
        assert "target" in {s.stop_reason for s in stopped.signals}
    for a, b in zip(stopped.curves, lagged.curves, strict=True):
        np.testing.assert_allclose(a.psnr, b.psnr, rtol=1e-5)
    for key, weight in stopped.weights.items():
        torch.testing.assert_close(lagged.weights[key], weight, rtol=1e-4, atol=1e-5)
    # Callbacks see the weights of the step that they are told about.
    known = {(index, step): value for index, step, value in looks[0]}
    shared = [(known[index, step], value) for index, step, value in looks[1] if (index, step) in known]
    assert len(shared) >= 2
    for expected, value in shared:
        assert value == pytest.approx(expected, rel=1e-4)


def test_those_that_stopped_keep_their_places_until_an_eighth_has(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    select = FlatStepper.select
    monkeypatch.setattr(FlatStepper, "select", lambda self, index: sizes.append(len(index)) or select(self, index))
    compacted = stack.Stack._compacted
    monkeypatch.setattr(stack.Stack, "_compacted", lambda self, share: compacted(self, 0.6))
    recipe = sf.recipe("paper", **RECIPES["a target"])
    how: dict[str, Any] = {"architecture": SMALL, "implementation": "triton"}
    kept = sf.fit(scans(8)[:3], "siren", recipe, **how)
    assert all(size <= 1 for size in sizes)  # 60 % of three are two
    monkeypatch.setattr(stack.Stack, "_compacted", compacted)
    expected = sf.fit(scans(8)[:3], "siren", recipe, **how)
    assert [s.steps for s in kept.signals] == [s.steps for s in expected.signals]
    for key, weight in expected.weights.items():
        torch.testing.assert_close(kept.weights[key], weight, rtol=1e-5, atol=1e-6)

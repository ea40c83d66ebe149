"""Everything that runs on a GPU, driven on the stand-in: it ends where the CPU ends."""

from pathlib import Path
from typing import Any

import pytest
import torch

import strainer_fast as sf
from strainer_fast.fitting import fitter, small
from strainer_fast.fitting.rendering import render
from tests import standin

ARCHITECTURE = sf.Architecture(hidden_features=16, num_layers=3, num_shared_layers=2)

EXACT_DB, ROUNDED_DB = 0.01, 0.1
"""How far a PSNR may be from the CPU's: sums in another order; operands rounded to 11 bits."""


@pytest.fixture(scope="module")
def signals() -> list[sf.Signal]:
    return sf.signals.samples("brain-mri", size=8)[:4]


@pytest.fixture(scope="module")
def trained(signals: list[sf.Signal]) -> sf.Encoder:
    recipe = sf.recipe("paper", pretrain_steps=30, pretrain_learning_rate=2e-3)
    return sf.pretrain(signals[2:], recipe, architecture=ARCHITECTURE, device="cpu")


def both(signals: list[sf.Signal], init: Any, recipe: sf.Recipe, **more: Any) -> list[sf.FitResult]:
    """A fit on the stand-in, and on the CPU by the same loop."""
    architecture = ARCHITECTURE if isinstance(init, str) else None
    return [sf.fit(signals, init, recipe, architecture=architecture, device=device, implementation=how, **more)
            for device, how in (("cuda", "auto"), ("cpu", "tiled"))]  # fmt: skip


def check(ours: sf.FitResult, cpus: sf.FitResult, decibels: float) -> None:
    assert ours.psnr == pytest.approx(cpus.psnr, abs=decibels)
    assert [s.stop_reason for s in ours.signals] == [s.stop_reason for s in cpus.signals]
    assert [s.steps for s in ours.signals] == [s.steps for s in cpus.signals]


RECIPES: dict[str, tuple[str, dict[str, Any], str, float]] = {
    "fast": ("fast", {"steps": 5}, "siren", EXACT_DB),
    "fast from an encoder": ("fast", {"steps": 5}, "encoder", EXACT_DB),
    "quality": ("quality", {"steps": 4}, "encoder", EXACT_DB),
    "prior": ("prior", {"steps": 4, "precision": "fp32"}, "encoder", EXACT_DB),
    "small": ("small", {"steps": 5}, "siren", ROUNDED_DB),
    "paper": ("paper", {"steps": 5}, "encoder", ROUNDED_DB),
    "shared": ("paper", {"steps": 3, "precision": "fp32"}, "shared", EXACT_DB),
    "mean": ("paper", {"steps": 3, "start": "mean"}, "encoder", ROUNDED_DB),
    "muon": ("paper", {"steps": 5, "optimiser": "muon", "learning_rate": 4e-3}, "encoder", EXACT_DB),
    "frozen": ("paper", {"steps": 4, "freeze": 1}, "encoder", ROUNDED_DB),
    "plateau, guard": (
        "paper",
        {
            "steps": 6,
            "schedule": "plateau",
            "guard_db": 0.1,
            "check_every": 2,
            "learning_rate": 3e-2,
            "precision": "fp32",
        },
        "encoder",
        0.05,  # long steps: differences grow
    ),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_fit_ends_where_the_cpus_does(name: str, signals: list[sf.Signal], trained: sf.Encoder) -> None:
    preset, changes, init, decibels = RECIPES[name]
    ours, cpus = both(signals[:2], trained if init == "encoder" else init, sf.recipe(preset, **changes))
    check(ours, cpus, decibels)
    assert ours.settings["environment"]["implementation"].startswith("triton")


@pytest.mark.parametrize("sampling", ["random", "lattice", "error"])
def test_sampled_points(sampling: str, signals: list[sf.Signal], trained: sf.Encoder) -> None:
    recipe = sf.recipe("paper", steps=4, sampling=sampling, check_every=2, learning_rate=1e-3)
    check(*both(signals[:1], trained, recipe), decibels=EXACT_DB)


@pytest.mark.parametrize(("preset", "target"), [("prior", 24.0), ("fast", 30.0)])
def test_stacks_part_and_join(
    preset: str, target: float, signals: list[sf.Signal], trained: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at a time; who has reached the target makes room for the next one."""
    monkeypatch.setattr(small, "engine_of", lambda implementation, device: None)  # step by step
    for name in ("GPU_STACK_ELEMENTS", "STACK_ELEMENTS"):
        monkeypatch.setattr(fitter, name, 2 * 64 * ARCHITECTURE.hidden_features)
    recipe = sf.recipe(preset, steps=6, target_psnr=target, precision="fp32")
    ours, cpus = both(signals, trained, recipe)
    check(ours, cpus, EXACT_DB)


PRETRAINING: dict[str, dict[str, Any]] = {
    "adam": {"pretrain_learning_rate": 1e-3, "precision": "fp32"},
    "muon": {"pretrain_optimiser": "muon", "pretrain_learning_rate": 4e-3, "pretrain_schedule": "cosine",
             "pretrain_warmup_steps": 2},
    "kfac": {"pretrain_optimiser": "kfac", "pretrain_learning_rate": 0.03},
    "maml": {"pretrain_method": "maml", "pretrain_steps": 2},
    "reptile": {"pretrain_method": "reptile", "pretrain_steps": 1},
}  # fmt: skip


@pytest.mark.parametrize("name", PRETRAINING)
def test_pretraining_ends_where_the_cpus_does(name: str, signals: list[sf.Signal]) -> None:
    recipe = sf.recipe("paper", **{"pretrain_steps": 4} | PRETRAINING[name])
    ours, cpus = (
        sf.pretrain(signals[:3], recipe, architecture=ARCHITECTURE, device=device, implementation=how)
        for device, how in (("cuda", "auto"), ("cpu", "tiled"))
    )
    torch.testing.assert_close(torch.tensor(ours.record["psnr"]), torch.tensor(cpus.record["psnr"]), rtol=0, atol=0.01)
    for a, b in zip(ours.parameters(), cpus.parameters(), strict=True):
        torch.testing.assert_close(a.detach().cpu(), b.detach(), rtol=1e-2, atol=1e-3)


def test_a_data_set(signals: list[sf.Signal], trained: sf.Encoder, tmp_path: Path) -> None:
    recipe = sf.recipe("small", steps=3, precision="fp32")
    found = [
        sf.fit_dataset(signals, tmp_path / device, trained, recipe, device=device, implementation=how)
        for device, how in (("cuda", "auto"), ("cpu", "tiled"))
    ]
    ours, cpus = ([row.signal.psnr for row in each.rows()] for each in found)
    assert ours == pytest.approx(cpus, abs=EXACT_DB)


def test_rendering() -> None:
    network = sf.Siren(2, 16, 3, 3)
    want = render(network, (9, 11))
    torch.testing.assert_close(render(network.to("cuda"), (9, 11)), want, rtol=0, atol=1e-5)


def test_a_default_device_changes_nothing(signals: list[sf.Signal]) -> None:
    recipe, more = sf.recipe("fast", steps=3), {"architecture": ARCHITECTURE, "device": "cuda"}
    want = sf.fit(signals[:1], "siren", recipe, **more)
    torch.set_default_device("cuda")
    try:
        got = sf.fit(signals[:1], "siren", recipe, **more)
    finally:
        torch.set_default_device(None)
    assert got.psnr == want.psnr


def test_whole_small_fits_ask_once_a_look(signals: list[sf.Signal], monkeypatch: pytest.MonkeyPatch) -> None:
    """One launch a look, and as much else whether a look is one step or many."""
    monkeypatch.setattr(small, "LOOK_SECONDS", 1e6)

    def counts(steps: int) -> standin.Counts:
        with standin.counted() as found:
            sf.fit(signals[:2], "siren", sf.recipe("small", steps=steps), architecture=ARCHITECTURE, device="cuda")
        return found

    few, many = counts(6), counts(7)  # looks at 0, 1, 3, and the end
    for each in (few, many):
        assert sum(n for what, n in each.launches.items() if what.startswith("small_fits_kernel")) == 4
    assert few.total("captures") == 0
    for name in ("operations", "launches", "synchronisations"):
        assert few.total(name) == many.total(name), name


def test_a_step_of_adam_is_two_graphs(signals: list[sf.Signal], monkeypatch: pytest.MonkeyPatch) -> None:
    """Per step of a fit that looks at its loss now and then: nothing is launched one by one, nobody waits."""
    monkeypatch.setattr(small, "engine_of", lambda implementation, device: None)  # step by step

    def counts(steps: int) -> standin.Counts:
        with standin.counted() as found:
            sf.fit(signals[:1], "siren", sf.recipe("paper", steps=steps, check_every=100), architecture=ARCHITECTURE,
                   device="cuda")  # fmt: skip
        return found

    few, many = counts(3), counts(6)
    assert few.total("captures") == 2
    for name, most in (("operations", 1), ("launches", 0), ("synchronisations", 0), ("captures", 0)):
        assert many.total(name) - few.total(name) <= 3 * most, (name, getattr(many, name))
    assert many.total("replays") - few.total("replays") == 2 * 3

"""A stack that stays full: signals that stop make room for the next, and nobody's fit depends on the company."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

import strainer_fast as sf
from strainer_fast.fitting import engine
from strainer_fast.fitting.fitter import STACK_ELEMENTS, Entry, Fitted, Fitter
from strainer_fast.fitting.record import Curve, Progress
from strainer_fast.kernels import cpu


class Row(NamedTuple):
    index: int
    signal: sf.FittedSignal
    curve: Curve
    weights: dict[str, torch.Tensor]


def fit_all(
    signals: list[sf.Signal], encoder: sf.Encoder, recipe: sf.Recipe, size: int, implementation: str = "tiled"
) -> tuple[list[Row], list[Progress]]:
    """All signals through a stack of `size`; what every look has seen."""
    waiting = [Entry(i, s, s.fingerprint()) for i, s in enumerate(signals)]
    fitted: list[Row] = []
    seen: list[Progress] = []

    def feed(number: int) -> list[Entry]:
        taken = waiting[:number]
        del waiting[:number]
        return taken

    def keep(stopped: Fitted) -> None:
        for row, (index, signal, record) in enumerate(
            zip(stopped.indices, stopped.signals, stopped.records, strict=True)
        ):
            fitted.append(Row(index, signal, record.curve(), {n: w[row] for n, w in stopped.weights.items()}))

    fits = Fitter(encoder, recipe, None, implementation, "cpu")
    fits.run(
        signals[0].values.shape,
        feed,
        size=size,
        stop=lambda: False,
        on_check=seen.append,
        on_fitted=keep,
    )
    return sorted(fitted, key=lambda f: f.index), seen


ADAM = {"learning_rate": 3e-3, "check_every": 1, "steps": 60, "target_psnr": 27.0}
RECIPES = {
    "adam": ADAM,
    "odd budget": ADAM | {"check_every": 4, "steps": 22, "start": "least_squares"},
    "cosine": ADAM | {"schedule": "cosine", "warmup_steps": 3},
    "plateau": ADAM | {"schedule": "plateau", "check_every": 2},
    "guard": ADAM | {"guard_db": 0.05},
    "muon": ADAM | {"optimiser": "muon"},
    "kfac": {"optimiser": "kfac", "learning_rate": 0.03, "damping": 0.1, "start": "least_squares", "steps": 12}
    | {"target_psnr": 32.0, "check_every": 1, "refresh_every": 3, "freeze": 1},
}


@pytest.mark.parametrize("name", RECIPES)
def test_company_changes_nothing_but_rounding(name: str, unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    recipe = sf.recipe("paper", **RECIPES[name])
    together, seen = fit_all(unseen, encoder, recipe, size=3)
    alone = [fit_all([s], encoder, recipe, size=1)[0][0] for s in unseen]
    assert len(together) == len(unseen)
    assert max(len(set(look.done)) for look in seen) > 1  # signals at different steps in one stack
    for a, b in zip(together, alone, strict=True):
        assert a.signal.name == unseen[a.index].name
        # Rounding grows along a fit: a step more or less at the end, the same decibels on the way there.
        shared = min(len(a.curve.psnr), len(b.curve.psnr), 20)
        np.testing.assert_allclose(a.curve.psnr[:shared], b.curve.psnr[:shared], atol=0.05)
        assert abs(a.signal.steps - b.signal.steps) <= 1
        assert a.signal.stop_reason in ("target", "budget", "diverged")


def test_the_stack_stays_full(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    signals = [sf.Signal(s.values, f"{s.name}-{i}") for i in range(3) for s in unseen]
    fitted, seen = fit_all(signals, encoder, sf.recipe("paper", **ADAM), size=4)
    stops = [f.signal.steps for f in fitted]
    assert len(set(stops)) > 3
    running = [len(look.running) for look in seen if len(look.running) > 1 or look is seen[-1]]
    assert max(running) <= 4
    # Looks at the newcomers alone aside, rows are empty only once the last signals run.
    steps, rows = 0, 0
    for look in seen:
        if 0 in look.done and len(set(look.done)) == 1:
            continue
        steps, rows = steps + 1, rows + len(look.running)
    assert rows == sum(stops)
    assert steps <= math.ceil(sum(stops) / 4) + max(stops)


def test_nobody_moves_after_the_budget(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    recipe = sf.recipe("paper", **ADAM | {"target_psnr": None, "steps": 7, "check_every": 5})
    fitted, _ = fit_all(unseen, encoder, recipe, size=2)
    assert [f.signal.steps for f in fitted] == [7] * len(unseen)
    assert [f.signal.stop_reason for f in fitted] == ["budget"] * len(unseen)
    for f, signal in zip(fitted, unseen, strict=True):
        alone = sf.fit(signal, encoder, recipe, implementation="tiled")
        assert all(torch.allclose(alone.weights[n][0], w, atol=1e-6) for n, w in f.weights.items())


def test_seconds_count_from_a_signals_own_start(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    fitted, seen = fit_all(unseen[:6], encoder, sf.recipe("paper", **ADAM | {"target_psnr": None}), size=2)
    for f in fitted:
        assert 0 < f.curve.seconds[0] <= f.curve.seconds[-1] <= f.signal.seconds
        assert (np.diff(f.curve.seconds) >= 0).all()
    assert sum(f.signal.seconds for f in fitted) <= 2.5 * seen[-1].seconds  # two at a time


def sixty_four(scans: list[sf.Signal], unseen: list[sf.Signal]) -> list[sf.Signal]:
    """Scans of two heads and what rolling them by some rows gives."""
    rolled = [sf.Signal(s.values.roll(k, 0), f"{s.name}-{k}") for k in range(8) for s in (*scans, *unseen)]
    return rolled[:64]


@pytest.mark.parametrize("name", ["adam", "kfac"])
def test_the_median_of_many_long_fits_does_not_depend_on_company(
    name: str, scans: list[sf.Signal], unseen: list[sf.Signal], encoder: sf.Encoder
) -> None:
    recipe = sf.recipe("paper", **RECIPES[name] | {"target_psnr": None, "steps": 60 if name == "adam" else 12})
    signals = sixty_four(scans, unseen)
    medians = []
    for size in (1, 16):
        fitted, _ = fit_all(signals, encoder, recipe, size=size)
        assert len(fitted) == 64
        medians.append(float(np.median([f.signal.psnr for f in fitted])))
    assert abs(medians[0] - medians[1]) <= 0.05


NATIVE = pytest.param("native", marks=pytest.mark.skipif(cpu.level() is None, reason="not run: no native engine"))


@pytest.mark.parametrize("implementation", ["torch", "tiled", NATIVE])
def test_losses_in_company_are_those_alone_while_roundings_are_small(
    implementation: str, scans: list[sf.Signal], unseen: list[sf.Signal], encoder: sf.Encoder
) -> None:
    recipe = sf.recipe("paper", learning_rate=1e-4, steps=20, check_every=1)
    signals = sixty_four(scans, unseen)
    together, _ = fit_all(signals, encoder, recipe, 16, implementation)
    for row in together[:: len(together) // 4]:
        alone = fit_all([signals[row.index]], encoder, recipe, 1, "torch")[0][0]
        mse = [10 ** (-np.asarray(r.curve.psnr) / 10) for r in (row, alone)]
        np.testing.assert_allclose(mse[0], mse[1], rtol=1e-4)


def test_little_memory_makes_a_stack_smaller(encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    fits = Fitter(encoder, sf.recipe("fast"), None, "tiled", "cpu")
    shape = (28, 28, 1)
    plenty = fits.stack_size(shape)
    assert plenty == STACK_ELEMENTS // (28 * 28 * encoder.architecture.hidden_features)
    needed = engine.step_bytes("tiled", 28 * 28, 1, plenty, False, encoder.architecture)
    monkeypatch.setattr(engine, "available_bytes", lambda device: needed)
    assert 1 <= fits.stack_size(shape) < plenty

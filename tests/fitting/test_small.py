"""Whole fits on the native engine against the step-by-step loop, and what `fit` does with them."""

import math
import os
import signal
import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch

import strainer_fast as sf
from strainer_fast.fitting import fitter, small, stack
from strainer_fast.kernels import cpu
from strainer_fast.ops.fit_small import DIVERGED, NON_FINITE, RUNNING, FitState, fit_small
from strainer_fast.ops.native import sweep

pytestmark = pytest.mark.skipif(cpu.level() is None, reason=f"not run: the native engine is {cpu.missing()}")


@pytest.fixture(params=cpu.LEVELS, autouse=True)
def _level(request: pytest.FixtureRequest):
    if request.param not in cpu.available():
        pytest.skip(f"not run: this CPU lacks {request.param}")
    with cpu.forced(request.param):
        yield


@pytest.fixture(autouse=True)
def _whole_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop below must not be what `fit` runs where a test says native."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fit went step by step")

    monkeypatch.setattr(stack, "run", refuse)


def quick(**changes: object) -> sf.Recipe:
    return sf.recipe("paper", **{"steps": 30, "learning_rate": 1e-3, "check_every": 1} | changes)


def native(signals: object, init: object, recipe: sf.Recipe, **options: object) -> sf.FitResult:
    return sf.fit(signals, init, recipe, implementation="native", **options)


def problem(
    num: int = 5, width: int = 17, channels: int = 2, size: int = 10
) -> tuple[torch.Tensor, torch.Tensor, list]:
    """Points, values and parameters of `num` networks with three sine layers."""
    stack = sf.BatchedSiren(num, 2, width, 4, channels, (30.0, 20.0, 10.0))
    generator = torch.Generator().manual_seed(1)
    stack.reset_parameters(generator)
    points = sf.signals.grid((size, size))
    return points, torch.rand(num, size * size, channels, generator=generator), list(stack.parameters())


OMEGAS = (30.0, 20.0, 10.0)
USUAL = {"betas": (0.9, 0.999), "eps": 1e-8, "check_every": 5}


def rates(steps: int, value: float = 1e-3) -> torch.Tensor:
    return torch.full((steps,), value)


def run(
    until: int = 20, steps: int = 20, frozen: int = 0, lr: float = 1e-3, num: int = 5, **options: object
) -> FitState:
    points, values, parameters = problem(num)
    state = FitState.fresh(parameters, steps, "guard_db" in options)
    arguments = USUAL | options
    fit_small(points, values, state, OMEGAS, until=until, learning_rates=rates(steps, lr), frozen=frozen, **arguments)
    return state


@pytest.mark.parametrize("width", [1, 3, 17, 33, 100])
def test_losses_of_a_fit_are_those_of_the_loop(width: int) -> None:
    from strainer_fast.fitting.optim import Adam
    from strainer_fast.ops import losses_and_gradients

    points, values, parameters = problem(width=width)
    # A learning rate at which rounding does not grow into another fit.
    state = FitState.fresh(parameters, 20, False)
    fit_small(points, values, state, OMEGAS, until=20, learning_rates=rates(20, 1e-4), **USUAL)
    twins = [p.detach().clone().requires_grad_() for p in parameters]
    adam, expected = Adam(twins, sf.recipe("paper"), len(values)), []
    for _ in range(21):
        losses, gradients = losses_and_gradients("torch", points, values, twins, OMEGAS, True)
        expected.append(losses)
        adam.update(twins, gradients)
    torch.testing.assert_close(state.mse, torch.stack(expected, 1), rtol=1e-4, atol=0)
    assert state.step.tolist() == [20] * 5
    assert state.measured.tolist() == [21] * 5


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bits_for_any_queue_any_calls_and_any_threads(threads: int) -> None:
    whole = run()
    points, values, parameters = problem()
    state = FitState.fresh(parameters, 20, False)
    torch.set_num_threads(threads)
    try:
        for until in (0, 1, 7, 20):
            queue = torch.randperm(5, generator=torch.Generator().manual_seed(until))
            fit_small(points, values, state, OMEGAS, until=until, learning_rates=rates(20), rows=queue, **USUAL)
    finally:
        torch.set_num_threads(1)
    for name in ("parameters", "exp_avg", "exp_avg_sq"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(whole, name), getattr(state, name), strict=True))
    for name in ("mse", "step", "measured", "reason"):
        assert torch.equal(getattr(whole, name), getattr(state, name))


def test_a_network_runs_the_same_alone() -> None:
    together = run()
    points, values, parameters = problem()
    alone = FitState.fresh([p[3:4] for p in parameters], 20, False)
    fit_small(points, values[3:4], alone, OMEGAS, until=20, learning_rates=rates(20), **USUAL)
    assert all(torch.equal(a[3], b[0]) for a, b in zip(together.parameters, alone.parameters, strict=True))


@pytest.mark.parametrize("frozen", [1, 3, 4])
def test_frozen_layers_stay(frozen: int) -> None:
    before = problem()[2]
    state = run(frozen=frozen)
    for i, (old, new, free) in enumerate(zip(before, state.parameters, run().parameters, strict=True)):
        assert torch.equal(old, new) == (i < 2 * frozen)
        assert not torch.equal(new, free)


def test_targets_are_looked_at_every_check() -> None:
    free = run(steps=60, until=60)
    psnr = -10 * free.mse.log10()
    target = psnr[:, 30] - 1e-3
    target[0] = math.nan  # none
    stopped = run(steps=60, until=60, target_psnr=target)
    assert stopped.reason.tolist() == [2, 1, 1, 1, 1]
    for n in range(1, 5):
        step = int(stopped.step[n])
        assert step % 5 == 0
        assert psnr[n, step] >= target[n]
        assert (psnr[n, :step:5] < target[n]).all()
        assert int(stopped.measured[n]) == step + 1


def test_not_a_number_stops_at_the_last_finite_weights() -> None:
    points, values, parameters = problem()
    values[2, 5] = math.nan
    state = FitState.fresh(parameters, 20, False)
    fit_small(points, values, state, OMEGAS, until=20, learning_rates=rates(20), **USUAL)
    assert state.reason.tolist() == [2, 2, NON_FINITE, 2, 2]
    assert int(state.measured[2]) == 0
    assert all(torch.equal(a[2], b[2]) for a, b in zip(state.parameters, parameters, strict=True))
    # A rate far too large: finite weights at the end, whatever calls the fit is cut into.
    for cut in ([20], [0, 1, 2, 3, 20]):
        state = FitState.fresh(parameters, 20, False)
        for until in cut:
            fit_small(points, values, state, OMEGAS, until=until, learning_rates=rates(20, 1e38), **USUAL)
        assert state.reason.tolist() == [NON_FINITE] * 5
        assert all(p.isfinite().all() for p in state.parameters)


def test_a_guard_rolls_back_once_then_stops_at_the_best() -> None:
    wild = {"lr": 0.3, "steps": 40, "until": 40, "check_every": 1}
    state = run(guard_db=0.5, **wild)
    assert (state.rollbacks <= 1).all()
    assert (state.rollbacks == 1).any()
    assert state.reason.tolist().count(DIVERGED) >= 1
    assert (state.scale[state.rollbacks == 1] == 0.5).all()
    points, values, _ = problem()
    losses = sweep(points, values, state.parameters, OMEGAS, [False] * 8).losses
    for n in (state.reason == DIVERGED).nonzero().flatten().tolist():
        assert float(losses[n]) == pytest.approx(float(state.best_mse[n]), rel=1e-6)
        assert float(state.best_mse[n]) == pytest.approx(float(state.mse[n, : state.measured[n]].min()), rel=1e-6)
    pieces = run(guard_db=0.5, **wild | {"until": 3})
    assert (pieces.reason == RUNNING).all()
    for until in (4, 11, 40):
        fit_small(
            points, values, pieces, OMEGAS, until=until, learning_rates=rates(40, 0.3), guard_db=0.5,
            **USUAL | {"check_every": 1},
        )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(state.parameters, pieces.parameters, strict=True))


@pytest.mark.parametrize("check_every", [1, 2])
def test_the_guard_is_that_of_the_loop(
    check_every: int, unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Spikes at once and again after the roll-back, before rounding has grown into another fit.
    recipe = quick(steps=12, learning_rate=0.3, guard_db=0.2, check_every=check_every)
    ours = native(unseen[:4], encoder, recipe)
    monkeypatch.undo()
    theirs = sf.fit(unseen[:4], encoder, recipe, implementation="tiled")
    assert ours.stop_reasons == theirs.stop_reasons
    assert "diverged" in ours.stop_reasons
    assert ours.steps == theirs.steps
    for a, b in zip(ours.curves, theirs.curves, strict=True):
        np.testing.assert_allclose(a.psnr[:2], b.psnr[:2], atol=0.1)


def test_fit_takes_the_engine_and_gives_the_same(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick(learning_rate=1e-4)
    ours = native(unseen[:3], encoder, recipe)
    monkeypatch.undo()
    theirs = sf.fit(unseen[:3], encoder, recipe, implementation="torch")
    for a, b in zip(ours.curves, theirs.curves, strict=True):
        np.testing.assert_allclose(a.psnr, b.psnr, atol=1e-3)
        assert len(a.seconds) == 31
        assert (np.diff(a.seconds) >= 0).all()
    np.testing.assert_allclose(ours.psnr, theirs.psnr, atol=1e-3)
    assert ours.steps == [30] * 3


def test_a_signal_does_not_depend_on_its_company_by_a_bit(unseen: list[sf.Signal], tiny: sf.Architecture) -> None:
    together = native(unseen[:4], "siren", quick(), architecture=tiny)
    alone = native(unseen[2], "siren", quick(), architecture=tiny)
    assert all(torch.equal(w[2], alone.weights[name][0]) for name, w in together.weights.items())
    assert together.psnr[2] == alone.psnr[0]


def test_each_signal_stops_on_its_own_target(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    seen: list[list[str]] = []
    result = native(unseen[:5], encoder, quick(steps=150), target_psnr=20.0, on_result=lambda r: seen.append(r.names))
    assert set(result.stop_reasons) == {"target"}
    assert len(set(result.steps)) > 1
    assert all(psnr >= 20.0 - 1e-3 for psnr in result.psnr)
    assert seen[-1] == result.names
    assert all(set(a) < set(b) for a, b in pairwise(seen))


def test_looks_from_outside_see_live_networks(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "LOOK_SECONDS", 0.0)
    seen, measured = [], []

    def look(progress: sf.Progress) -> None:
        seen.append(progress)
        mse = sf.reference.mse(progress.module(1)(unseen[1].points()), unseen[1].samples())
        measured.append(float(-10 * mse.detach().log10()))

    native(unseen[:2], encoder, quick(steps=20, check_every=5), on_check=look)
    assert [p.step for p in seen][:3] == [0, 1, 2]
    assert seen[-1].step == 20
    np.testing.assert_allclose(measured, [p.psnr[1] for p in seen], atol=1e-3)


def test_ctrl_c_keeps_what_is_there(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(small, "NETWORKS_PER_THREAD", 2)
    monkeypatch.setattr(fitter, "STACK_ELEMENTS", 1)

    def press(progress: sf.Progress) -> None:
        if progress.running[0] == 2 and progress.step == 10:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(sf.Interrupted, match="2 of 5 signals finished") as caught:
        native(unseen[:5], encoder, quick(), on_check=press)
    partial = caught.value.result
    assert partial.stop_reasons == ["budget", "budget", "interrupted", "interrupted"]
    assert partial.steps[2] == len(partial.curves[2].psnr) - 1 == 11
    full, resumed = native(unseen[:5], encoder, quick()), native(unseen[:5], encoder, quick(), done=partial)
    assert all(torch.equal(full.weights[n], resumed.weights[n]) for n in full.weights)


@pytest.mark.parametrize("guard_db", [None, 3.0])
def test_a_sick_neighbour_changes_nothing(guard_db: float | None) -> None:
    # Width 17 fills no whole vector: what fills it up must not carry NaN to the next network on the thread.
    points, values, parameters = problem()
    rate = torch.full((20,), 1e-3)
    rate[1] = 1e38  # recovers by the guard, where there is one
    options = USUAL | {"guard_db": guard_db, "check_every": 1}
    for rates_, poison in ((rates(20), math.nan), (rate, 0.5)):
        sick = values.clone()
        sick[1, 3] = poison
        whole, cut = (FitState.fresh(parameters, 20, guard_db is not None) for _ in range(2))
        fit_small(points, sick, whole, OMEGAS, until=20, learning_rates=rates_, **options)
        for until in range(21):
            fit_small(points, sick, cut, OMEGAS, until=until, learning_rates=rates_, **options)
        alone = FitState.fresh([p[2:3] for p in parameters], 20, guard_db is not None)
        fit_small(points, sick[2:3], alone, OMEGAS, until=20, learning_rates=rates_, **options)
        for a, b, c in zip(whole.parameters, cut.parameters, alone.parameters, strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a[2], c[0])
            assert a.isfinite().all()
        assert torch.equal(whole.reason, cut.reason)
        assert int(whole.reason[2]) == int(alone.reason[0])


@pytest.mark.parametrize("changes", [{"eps": 0.0}, {"betas": (0.9, 0.99999)}, {"betas": (0.5, 0.99999999)}])
def test_adams_settings_at_their_ends(
    changes: dict[str, object], unseen: list[sf.Signal], monkeypatch: pytest.MonkeyPatch
) -> None:
    architecture, recipe = sf.Architecture(17, 4, 3), quick(learning_rate=1e-4, steps=10, **changes)
    ours = native(unseen[:2], "siren", recipe, architecture=architecture)
    monkeypatch.undo()
    theirs = sf.fit(unseen[:2], "siren", recipe, architecture=architecture, implementation="tiled")
    assert ours.stop_reasons == theirs.stop_reasons == ["budget"] * 2
    for a, b in zip(ours.curves, theirs.curves, strict=True):
        np.testing.assert_allclose(a.psnr, b.psnr, atol=1e-3)


def test_an_interrupted_spike_keeps_the_best(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small, "LOOK_SECONDS", 0.0)

    def press(progress: sf.Progress) -> None:
        if progress.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(sf.Interrupted) as caught:
        native(unseen[:2], encoder, quick(learning_rate=1e38, check_every=5, guard_db=1.0), on_check=press)
    partial = caught.value.result
    assert all(w.isfinite().all() for w in partial.weights.values())
    np.testing.assert_allclose(partial.psnr, [c.psnr[0] for c in partial.curves], atol=1e-3)


def test_default_dtype_and_device_change_nothing(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    expected = native(unseen[:2], encoder, quick(steps=5))
    torch.set_default_dtype(torch.float64)
    try:
        result = native(unseen[:2], encoder, quick(steps=5))
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected.weights.values(), result.weights.values(), strict=True))
    points, values, parameters = problem()
    plain = FitState.fresh(parameters, 3, True)
    with torch.device("meta"):
        state = FitState.fresh(parameters, 3, True)
        fit_small(points, values, state, OMEGAS, until=3, learning_rates=plain.mse[0, :3] + 1e-3, **USUAL)
    assert int(state.step[0]) == 3


def test_what_runs_is_recorded(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    recorded = sf.fit(unseen[0], encoder, quick(steps=1)).settings["environment"]["implementation"]
    level = cpu.level()
    assert recorded == ("tiled, whole fits native (portable)" if level == "portable" else f"native ({level})")


BAD: dict[str, tuple[dict[str, object], str]] = {
    "budget": ({"learning_rates": rates(7)}, r"learning_rates: expected one per step of the state, 7 in all, got a st"),
    "omegas": ({"omegas": (30.0,)}, "omegas: expected one per sine layer, 3 in all, got 1"),
    "guard": ({"guard_db": 1.0}, "guard_db: expected a state with a guard"),
    "check_every": ({"check_every": 0}, "check_every"),
    "until": ({"until": 6}, "until: expected an integer of at least 0 and at most 5"),
    "frozen": ({"frozen": 9}, "frozen"),
    "rows_twice": ({"rows": torch.tensor([1, 1])}, "rows: expected different indices"),
    "rows_dtype": ({"rows": torch.tensor([1], dtype=torch.int32)}, "rows: expected different indices, int64"),
    "rows_range": ({"rows": torch.tensor([5])}, "rows: expected indices below 5"),
    "values": ({"values": torch.zeros(5, 99, 2)}, r"points and values: expected \[P, in\] and \[5, P, 2\]"),
    "points": ({"points": torch.zeros(100, 3)}, r"parameters: expected \[5, out, 3\]"),
    "target": ({"target_psnr": torch.zeros(4)}, "target_psnr"),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_unusable_arguments(change: tuple[dict[str, object], str]) -> None:
    points, values, parameters = problem()
    state = FitState.fresh(parameters, 5, False)
    usual = {"points": points, "values": values, "state": state, "omegas": OMEGAS, "learning_rates": rates(5)}
    with pytest.raises(sf.InputError, match=change[1]):
        fit_small(**usual | {"until": 5} | USUAL | change[0])


def test_until_a_step_that_is_done_changes_nothing() -> None:
    state = run(until=10)
    points, values, _ = problem()
    before = [p.clone() for p in state.parameters]
    fit_small(points, values, state, OMEGAS, until=4, learning_rates=rates(20), **USUAL)
    assert state.step.tolist() == [10] * 5
    assert all(torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))


def test_no_steps_and_no_points(encoder: sf.Encoder, unseen: list[sf.Signal]) -> None:
    result = native(unseen[:2], encoder, quick(steps=0, start="least_squares"))
    assert result.steps == [0, 0]
    assert result.stop_reasons == ["budget", "budget"]
    _, _, parameters = problem()
    state = FitState.fresh(parameters, 3, False)
    fit_small(torch.zeros(0, 2), torch.zeros(5, 0, 2), state, OMEGAS, until=3, learning_rates=rates(3), **USUAL)
    assert state.reason.tolist() == [NON_FINITE] * 5  # the mean of nothing


@dataclass(frozen=True)
class Newer(sf.Recipe):
    """A recipe with a field that these fits do not know."""

    pruning: str = "none"


def test_what_rules_it_out_is_named() -> None:
    tiny = sf.Architecture(32, 4, 3)
    assert small.ruled_out(sf.recipe("paper"), tiny, 2, 1, 784) is None
    assert small.ruled_out(Newer(), tiny, 2, 1, 784) is None
    assert small.ruled_out(Newer(pruning="half"), tiny, 2, 1, 784) == "recipe.pruning = 'half'"
    for change in ({"sampling": "lattice"}, {"optimiser": "kfac"}, {"schedule": "plateau"}, {"until_exact": True}):
        ((name, value),) = change.items()
        assert small.ruled_out(sf.recipe("paper", **change), tiny, 2, 1, 784) == f"recipe.{name} = {value!r}"
    assert "KiB" in str(small.ruled_out(sf.recipe("paper"), sf.Architecture(), 2, 1, 784))
    assert (
        small.ruled_out(sf.recipe("paper", steps=10**9), tiny, 2, 1, 784) == "recipe.steps = 1000000000, above 100000"
    )
    assert "MFLOP" in str(small.ruled_out(sf.recipe("paper"), tiny, 2, 1, 10**6))
    lines = sf.explain(Newer(pruning="half"), [(28, 28, 1)], architecture=tiny, implementation="native").splitlines()
    assert lines[1] == "fits of 28x28x1: step by step: recipe.pruning = 'half'"
    lines = sf.explain("paper", [(28, 28, 1)], architecture=tiny, implementation="native").splitlines()
    assert "fit_small" in lines[1]
    with pytest.raises(sf.InputError, match="Add the channels"):
        sf.explain("paper", [(28,)])


def test_frozen_layers_of_an_encoder(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    seen: list[float] = []

    def look(progress: sf.Progress) -> None:
        network = progress.module(1)
        assert torch.equal(network.layers[1].weight, encoder.layers[1].weight)
        seen.append(progress.psnr[1])

    recipe = quick(freeze=2, steps=20, start="least_squares")
    ours = sf.fit(unseen[:2], encoder, recipe, implementation="native", on_check=look)
    for n in range(2):
        assert torch.equal(ours.weights["layers.1.weight"][n], encoder.layers[1].weight.detach())
        assert not torch.equal(ours.weights["layers.2.weight"][n], encoder.layers[2].weight.detach())
    assert seen[-1] == pytest.approx(ours.psnr[1], abs=1e-3)


def test_frozen_layers_of_an_encoder_are_those_of_the_loop(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = quick(freeze=2, steps=20, learning_rate=1e-4)
    whole = sf.fit(unseen[:2], encoder, recipe, implementation="native")
    monkeypatch.undo()
    steps = sf.fit(unseen[:2], encoder, recipe, implementation="tiled")
    for a, b in zip(whole.curves, steps.curves, strict=True):
        np.testing.assert_allclose(a.psnr, b.psnr, atol=1e-3)


@pytest.mark.parametrize("start", ["random", "least_squares"])
@pytest.mark.parametrize("init", ["siren", "shared", "encoder"])
def test_no_start_depends_on_the_company_by_a_bit(
    init: str, start: str, unseen: list[sf.Signal], encoder: sf.Encoder, tiny: sf.Architecture
) -> None:
    given = {"init": encoder} if init == "encoder" else {"init": init, "architecture": tiny}
    recipe = quick(start=start, steps=3)
    together = sf.fit(unseen[:5], recipe=recipe, **given)
    alone = sf.fit(unseen[3], recipe=recipe, **given)
    assert all(torch.equal(w[3], alone.weights[name][0]) for name, w in together.weights.items())
    assert together.psnr[3] == alone.psnr[0]


def test_shared_networks_start_alike(unseen: list[sf.Signal], tiny: sf.Architecture) -> None:
    shared = sf.fit(unseen[:3], "shared", quick(steps=0), architecture=tiny)
    own = sf.fit(unseen[:3], "siren", quick(steps=0), architecture=tiny)
    for name, w in shared.weights.items():
        assert torch.equal(w[0], w[1]) and torch.equal(w[0], w[2])
        assert not torch.equal(own.weights[name][0], own.weights[name][1])
    assert shared.settings["init"] == "shared"
    headed = sf.fit(unseen[:3], "shared", quick(steps=0, start="least_squares"), architecture=tiny)
    assert torch.equal(headed.weights["layers.1.weight"], shared.weights["layers.1.weight"])
    assert min(headed.psnr) > max(shared.psnr)

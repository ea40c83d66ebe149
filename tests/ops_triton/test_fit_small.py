"""Whole fits by the Triton kernel against the native engine, and what `fit` does with them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast.fitting import small, stack
from strainer_fast.kernels import cpu
from strainer_fast.kernels import small_fits as launcher
from strainer_fast.kernels.chip import CHIPS, assume
from strainer_fast.ops import fit_small as engine
from strainer_fast.ops.fit_small import FitState, fit_small

needs_native = pytest.mark.skipif(cpu.level() is None, reason=f"not run: the native engine is {cpu.missing()}")

OMEGAS = (20.0, 6.0)
TINY = sf.Architecture(hidden_features=16, num_layers=3, num_shared_layers=2)


def problem(num: int = 2) -> tuple[Tensor, Tensor, list[Tensor]]:
    stack = sf.BatchedSiren(num, 2, 16, 3, 1, OMEGAS, device="cpu")
    generator = torch.Generator().manual_seed(1)
    stack.reset_parameters(generator)
    values = torch.rand(num, 64, 1, generator=generator, device="cpu")
    return sf.signals.grid((8, 8)).cpu(), values, [p.detach() for p in stack.parameters()]


def both(steps: int = 10, rate: float | list[float] = 1e-4, poison: bool = False, **options: Any) -> list[FitState]:
    """The same fits by the native engine and by Triton."""
    points, values, parameters = problem()
    if poison:
        values[1, 3] = math.nan
    rates = torch.full((steps,), rate, device="cpu") if isinstance(rate, float) else torch.tensor(rate, device="cpu")
    device, states = torch.empty(0).device, []
    given = {"until": steps, "betas": (0.9, 0.999), "eps": 1e-8, "check_every": 2} | options
    for implementation, where in (("native", torch.device("cpu")), ("triton", device)):
        mine = [p.to(where) for p in parameters]
        state = FitState.fresh(mine, steps, "guard_db" in options, implementation)
        fit_small(points.to(where), values.to(where), state, OMEGAS, learning_rates=rates, **given)
        states.append(state)
    return states


def same(native: FitState, triton: FitState, rtol: float = 1e-4) -> None:
    for name in ("step", "adam_step", "rollbacks", "measured", "reason", "scale"):
        assert getattr(triton, name).tolist() == getattr(native, name).tolist(), name
    torch.testing.assert_close(triton.mse.cpu(), native.mse, rtol=rtol, atol=0, equal_nan=True)
    for a, b in zip(triton.parameters, native.parameters, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-2, atol=1e-4)


CASES: dict[str, dict[str, Any]] = {
    "plain": {"steps": 20},
    "frozen": {"frozen": 1, "rate": 1e-3},
    "all frozen": {"frozen": 3, "steps": 2},
    "left early": {"until": 3},
    "no steps": {"steps": 0},
    "target": {"target_psnr": torch.tensor([4.0, math.nan], device="cpu"), "rate": 1e-3},
    "not a number": {"poison": True},
    "far too large": {"rate": [1e-4, 1e38, 1e-4], "steps": 3},
    "guard": {"guard_db": 1.0, "rate": [1e-4, 1e-4, 0.1, 1e-4, 1e-4, 1e-4], "steps": 6, "check_every": 1},
    "guard, twice": {"guard_db": 3.0, "rate": [1e-4, 1e38, 1e-4, 1e38, 1e-4], "steps": 5, "check_every": 1},
    "guard and a sick signal": {"guard_db": 3.0, "poison": True, "steps": 5, "check_every": 1},
    "other betas": {"betas": (0.5, 0.9), "eps": 0.0, "steps": 5},
}


@needs_native
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, which interprets
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_fits_are_those_of_the_native_engine(case: dict[str, Any]) -> None:
    native, triton = both(**case)
    same(native, triton)
    reason, measured, skipped, last = triton.seen()
    assert reason == triton.reason.tolist() and measured == triton.measured.tolist() and skipped == [0, 0]
    np.testing.assert_equal(last, [float(triton.mse[n, max(m - 1, 0)]) for n, m in enumerate(measured)])


def test_the_state_is_views_of_flat_memory() -> None:
    _, _, parameters = problem()
    state = FitState.fresh(parameters, 3, True, "triton")
    for stacked in (state.parameters, state.best):
        assert all(torch.equal(a, b) for a, b in zip(stacked, parameters, strict=True))
    state.parameters[0][1, 2, 0] = 7.0
    assert float(state.flat[0][1, 4]) == 7.0
    assert [len(FitState.fresh(parameters, 3, guard, "triton").flat) for guard in (False, True)] == [3, 4]


def test_unusable_states() -> None:
    points, values, parameters = problem()
    given: dict[str, Any] = {"until": 1, "betas": (0.9, 0.999), "eps": 1e-8, "check_every": 1}
    given["learning_rates"] = torch.zeros(1)
    with pytest.raises(sf.InputError, match="implementation: expected one of 'native', 'triton'"):
        FitState.fresh(parameters, 1, False, "tiled")
    uneven = [torch.zeros(2, 16, 2), torch.zeros(2, 16), torch.zeros(2, 8, 16), torch.zeros(2, 8)]
    with pytest.raises(sf.InputError, match="equally wide sine layers"):
        FitState.fresh([*uneven, torch.zeros(2, 1, 8), torch.zeros(2, 1)], 1, False, "triton")
    state = FitState.fresh(parameters, 1, False, "triton")
    state.parameters[0] = state.parameters[0].clone()
    with pytest.raises(sf.InputError, match="state: expected views of its flat tensors"):
        fit_small(points, values, state, OMEGAS, **given)
    with pytest.raises(sf.InputError, match="precision: expected 'fp32'"):
        native = FitState.fresh(parameters, 1, False, "native")
        fit_small(points, values, native, OMEGAS, precision="fp16", **given)


@pytest.fixture
def whole(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`fit` runs whole fits by Triton, under the interpreter too; the steps that its launches went to."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("fit went step by step")

    launched: list[int] = []
    launch = launcher.launch_small_fits

    def counted(*args: Any, **kwargs: Any) -> None:
        launched.append(kwargs["until"])
        launch(*args, **kwargs)

    monkeypatch.setattr(launcher, "launch_small_fits", counted)
    monkeypatch.setattr(small, "LOOK_SECONDS", 1e6)
    monkeypatch.setattr(small, "engine_of", lambda implementation, device: implementation)
    monkeypatch.setattr(stack, "run", refuse)
    return launched


@needs_native
def test_fit_takes_the_kernel_and_gives_the_same(whole: list[int]) -> None:
    signals = sf.signals.samples("brain-mri", size=10)[:3]
    recipe = sf.recipe("paper", steps=8, learning_rate=1e-3, check_every=2, precision="fp32", guard_db=3.0)
    seen: list[int] = []
    ours = sf.fit(
        signals, "siren", recipe, target_psnr=9.0, architecture=TINY, implementation="triton",
        on_check=lambda p: seen.append(p.step),
    )  # fmt: skip
    native = sf.fit(signals, "siren", recipe, target_psnr=9.0, architecture=TINY, implementation="native", device="cpu")
    assert ours.steps == native.steps
    assert len(set(ours.steps)) > 1
    assert ours.stop_reasons == native.stop_reasons
    np.testing.assert_allclose(ours.psnr, native.psnr, atol=1e-3)
    for a, b in zip(ours.curves, native.curves, strict=True):
        np.testing.assert_allclose(a.psnr, b.psnr, atol=1e-3)
        assert len(a.seconds) == len(a.psnr)
        assert (np.diff(a.seconds) >= 0).all()
    assert ours.settings["environment"]["implementation"] == "triton (fp32), whole fits on chip"
    assert whole == [0, 1, 3, 7, 8]  # launches: one a look, not one a step
    assert len(seen) == len(whole)


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, which interprets
def test_overflowing_gradients_are_told(whole: list[int]) -> None:
    signals = sf.signals.samples("brain-mri", size=8)[:2]
    recipe = sf.recipe("paper", steps=3, learning_rate=1e3, precision="fp16")
    with pytest.warns(
        UserWarning, match="gradients overflowed in fp16 and 2 networks skipped steps. They continue with"
    ):
        result = sf.fit(signals, "siren", recipe, architecture=TINY, implementation="triton")
    assert result.stop_reasons == ["budget"] * 2


def test_auto_takes_it_where_it_fits() -> None:
    gpu = torch.device("meta")  # stands for a GPU: nothing is launched
    assert small.engine_of("triton", torch.device("cuda")) == "triton"
    assert small.engine_of("triton", torch.device("cpu")) is None
    assert small.engine_of("native", torch.device("cpu")) == "native"
    assert small.engine_of("torch", torch.device("cuda")) is None

    def why(width: int, points: int = 784, precision: str = "fp16", layers: int = 4, **changes: Any) -> str | None:
        network = sf.Architecture(width, layers, layers - 1)
        with assume(CHIPS["sm_90"]):
            return small.ruled_out(
                sf.recipe("paper", **changes), network, 2, 3, points, precision=precision, device=gpu
            )

    for width in (20, 32, 64):
        assert [why(width, precision=p) for p in ("fp32", "tf32", "fp16", "bf16")] == [None] * 4
    assert why(32, layers=9) is None
    assert why(65) == "width 65 in fp16 does not fit a block"
    assert why(32, 10**5) == f"a step of {6 * 2307 * 1e5 / 1e6:.0f} MFLOP is above {engine.GPU_STEP_FLOPS / 1e6:.0f}"
    assert why(32, optimiser="kfac") == "recipe.optimiser = 'kfac'"
    with assume(CHIPS["sm_90"]):
        assert launcher.small_fits_programs(10**6, 32, "fp16") == 2 * 132
        assert launcher.small_fits_programs(100, 32, "fp16") == 100

"""Whole steps on the Triton kernels: fits and pre-training, skipped steps, and nothing allocated or awaited."""

import gc
import math
import warnings
import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import strainer_fast as sf
from strainer_fast.fitting import fitter
from strainer_fast.fitting.optim import Adam
from strainer_fast.fitting.stepper import Stepper
from strainer_fast.fitting.steppers import make_stepper
from strainer_fast.fitting.triton_stepper import TritonStepper
from tests.kernels.guards import relative

ARCHITECTURE = sf.Architecture(hidden_features=32, num_layers=4, num_shared_layers=3)


def scans(size: int) -> list[sf.Signal]:
    return sf.signals.samples("brain-mri", size=size)


def losses(result: sf.FitResult) -> Tensor:
    return torch.stack([10 ** (-torch.from_numpy(c.psnr).double() / 10) for c in result.curves])


def test_a_fit_equals_the_cpus() -> None:
    recipe = sf.recipe("paper", steps=20, precision="fp32")
    ours, cpus = (
        sf.fit(scans(24)[:1], "siren", recipe, architecture=ARCHITECTURE, implementation=i) for i in ("triton", "tiled")
    )
    torch.testing.assert_close(losses(ours), losses(cpus), rtol=1e-4, atol=0)
    for name, w in ours.weights.items():
        torch.testing.assert_close(w, cpus.weights[name], rtol=1e-3, atol=1e-4)
    assert ours.settings["environment"]["implementation"] == "triton (fp32)"


def test_pretraining_equals_the_cpus_and_goes_on_from_its_checkpoint(tmp_path: Any) -> None:
    recipe = sf.recipe("paper", pretrain_steps=8, precision="fp32", check_every=2)
    given = {"architecture": ARCHITECTURE, "checkpoint_seconds": 0.0}
    ours, cpus = (sf.pretrain(scans(16)[:3], recipe, implementation=i, **given) for i in ("triton", "tiled"))
    for a, b in zip(ours.parameters(), cpus.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(ours.record["psnr"]), torch.tensor(cpus.record["psnr"]), rtol=1e-4, atol=0)

    def interrupt(progress: sf.Progress) -> None:
        if progress.step == 6:
            raise KeyboardInterrupt

    path = tmp_path / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        sf.pretrain(scans(16)[:3], recipe, implementation="triton", checkpoint=path, on_check=interrupt, **given)
    resumed = sf.pretrain(scans(16)[:3], recipe, implementation="triton", checkpoint=path, **given)
    for a, b in zip(resumed.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


def test_signals_leave_the_stack_on_their_own() -> None:
    recipe = sf.recipe("paper", steps=12, precision="fp32", check_every=2, learning_rate=1e-3)
    start = sf.fit(scans(12)[:3], "siren", sf.recipe(recipe, steps=0), architecture=ARCHITECTURE).psnr
    target = sorted(start)[1] + 1.0  # one is there already, one soon, one late
    ours, cpus = (
        sf.fit(scans(12)[:3], "siren", recipe, target_psnr=target, architecture=ARCHITECTURE, implementation=i)
        for i in ("triton", "tiled")
    )
    assert ours.steps == cpus.steps
    assert len(set(ours.steps)) > 1
    assert ours.stop_reasons == cpus.stop_reasons
    torch.testing.assert_close(torch.tensor(ours.psnr), torch.tensor(cpus.psnr), rtol=1e-4, atol=0)


def test_the_next_signal_takes_the_place_of_one_that_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitter, "STACK_ELEMENTS", 2 * 144 * 32)  # two signals a stack
    recipe = sf.recipe("paper", steps=12, precision="fp32", check_every=2, learning_rate=1e-3)
    seen: list[set[int]] = []
    ours, cpus = (
        sf.fit(
            *(scans(12)[:5], "siren", recipe),
            target_psnr=10.0,  # after 2, 10, 8, 12 and 6 steps
            architecture=ARCHITECTURE,
            implementation=i,
            on_check=lambda p: seen.append(set(p.done)),
        )
        for i in ("triton", "tiled")
    )
    assert any(len(done) > 1 for done in seen)
    assert ours.steps == cpus.steps
    torch.testing.assert_close(torch.tensor(ours.psnr), torch.tensor(cpus.psnr), rtol=1e-4, atol=0)


def stepper(
    implementation: str, precision: str = "fp32", signals: int = 2, shared: bool = False, **changes: Any
) -> Stepper:
    torch.manual_seed(0)
    model = sf.Strainer(2, 20, 4, 1, 3, signals) if shared else sf.BatchedSiren(signals, 2, 20, 4, 1)
    layers = [*model.encoder.layers, model.head] if shared else [*model.layers, model.head]
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    recipe = sf.recipe("paper", learning_rate=1e-3)
    adam = Adam(parameters, recipe, None if shared else signals)
    points, values = sf.signals.grid((8, 8)), torch.rand(signals, 64, 1)
    given = {
        "implementation": implementation,
        "precision": precision,
        "independent": not shared,
        "keep": True,
    } | changes
    return make_stepper(points, values, parameters, [30.0] * 3, adam, **given)


def test_stacks_join_whatever_their_gradients_are_scaled_by() -> None:
    lowered, other, plain = (stepper("triton", precision="fp16") for _ in range(3))
    assert isinstance(lowered, TritonStepper)
    lowered.scale /= 16  # as `look` does after an overflow
    lowered.pipeline.table.scales[:, 0] *= 16
    lowered.lowered /= 16
    for each in (lowered, other, plain):
        each.evaluate(0, True)
    joined = lowered.join(other)
    for _ in range(3):
        joined.update()
        plain.update()
        a, b = joined.evaluate(0, True), plain.evaluate(0, True)
        torch.testing.assert_close(a.view(2, 2), b.expand(2, 2), rtol=1e-3, atol=0)
    assert joined.optimiser.step.tolist() == [3] * 4
    for a, b in zip(joined.parameters, plain.parameters, strict=True):
        assert relative(a.detach()[2:], b.detach()) <= 1e-3


@pytest.mark.parametrize("shared", [False, True], ids=["stack", "heads"])
def test_steps_equal_plain_ones(shared: bool) -> None:
    ours, plain = stepper("triton", shared=shared), stepper("torch", shared=shared)
    assert isinstance(ours, TritonStepper)
    for _ in range(4):
        torch.testing.assert_close(ours.evaluate(0, True), plain.evaluate(0, True), rtol=1e-4, atol=1e-6)
        ours.update()
        plain.update()
    ours.look()
    assert torch.equal(ours.optimiser.step, plain.optimiser.step)
    for a, b in zip(ours.parameters, plain.parameters, strict=True):
        assert relative(a.detach(), b.detach()) <= 1e-4
    for a, b in zip(ours.optimiser.exp_avg_sq, plain.optimiser.exp_avg_sq, strict=True):
        assert relative(a, b) <= 1e-3


def test_a_network_that_is_not_finite_stays_where_it_was_and_its_neighbour_goes_on() -> None:
    ours = stepper("triton")
    ours.evaluate(0, True)
    ours.update()
    finite = [p.detach().clone() for p in ours.parameters]
    with torch.no_grad():
        for p in ours.parameters:
            p[0] = math.nan  # as after a step that was too long
    ours.look()
    ours.changed()
    ours.previous.copy_(ours._flattened(list(finite)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the interpreter computes with numpy
        for _ in range(2):
            assert ours.evaluate(0, True).isfinite().tolist() == [False, True]
            ours.update()
        ours.evaluate(0, True)
    ours.look()
    assert ours.optimiser.step.tolist() == [1, 3]
    assert ours.skipped.tolist() == [2, 0]
    for kept, before, now in zip(ours.last_finite(), finite, ours.parameters, strict=True):
        assert torch.equal(kept[0], before[0])
        assert torch.equal(kept[1], now.detach()[1])


def test_gradients_that_overflow_half_precision_are_said_and_mended() -> None:
    ours = stepper("triton", "fp16", signals=1)
    ours.scale *= 2.0**16  # residuals beyond 65,504, as a far too large loss scale makes them
    ours.pipeline.table.scales[:, 0] /= 2.0**16
    before = [p.detach().clone() for p in ours.parameters]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        ours.evaluate(0, True)
        ours.update()
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters, strict=True))
    for _ in range(4):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            ours.look()
        if not any("overflowed in fp16" in str(w.message) for w in said):
            break
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            ours.evaluate(0, True)
            ours.update()
    assert ours.optimiser.step.item() >= 1
    assert not all(torch.equal(a, b) for a, b in zip(before, ours.parameters, strict=True))


def test_roll_back_keeps_the_others_count_and_is_no_overflow() -> None:
    counts = []
    for implementation in ("triton", "torch"):
        ours = stepper(implementation, signals=3)
        for _ in range(3):
            ours.evaluate(0, True)
            ours.update()
        with torch.no_grad():
            ours.parameters[0][1] = math.nan
        ours.look()
        ours.changed()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            ours.evaluate(0, True)
            ours.look()
            ours.update()
        # What the loop does when the guard has seen a spike.
        ours.look()
        with torch.no_grad():
            ours.parameters[0][1] = 0.1
        ours.optimiser.restart(1)
        ours.changed()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ours.evaluate(0, True)
            ours.update()
            ours.look()
        counts.append(ours.optimiser.step.tolist())
    assert counts[0] == counts[1] == [5, 1, 5]


def test_a_lowered_scale_survives_departures_and_memory_is_freed() -> None:
    ours = stepper("triton", "fp16")
    ours.scale /= 16
    ours.pipeline.table.scales[:, 0] *= 16
    ours.evaluate(0, True)
    chosen = ours.select(torch.tensor([1]))
    assert torch.equal(chosen.scale, ours.scale[1:])
    assert torch.equal(chosen.pipeline.table.scales, ours.pipeline.table.scales)
    gone = weakref.ref(ours.pipeline)
    gc.disable()
    try:
        del ours
        assert gone() is None  # at once, not when the collector comes: it holds a wave of activations
    finally:
        gc.enable()


class Counting(TorchDispatchMode):
    """Counts what PyTorch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("width", [20, 80], ids=["on_chip", "by_layers"])
@pytest.mark.parametrize("shared", [False, True], ids=["stack", "heads"])
def test_a_step_allocates_nothing_and_waits_for_nothing(
    shared: bool, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = stepper("triton", shared=shared)
    assert isinstance(ours, TritonStepper)
    if width > 64:
        from strainer_fast.kernels import plan

        monkeypatch.setattr(plan, "fits_on_chip", lambda *a: False)
        ours = stepper("triton", shared=shared)
    assert ours.pipeline.on_chip == (width == 20)
    launched = []
    for kernel in kernels():
        monkeypatch.setattr(type(kernel), "run", lambda self, *a, **k: launched.append(self), raising=False)
    with Counting() as counting, torch.no_grad():
        ours._launch_gradients()
        ours._launch_update()
    assert counting.calls == {}
    # Forward, heads, chain of each layer, weights of all; losses with sums, Adam with the count.
    assert len(launched) == (1 if ours.pipeline.on_chip else 7) + 2


def kernels() -> list[Any]:
    from strainer_fast.kernels import chains, heads, kfac, layers, muon, newton_schulz, on_chip, optim

    modules = (chains, heads, kfac, layers, muon, newton_schulz, on_chip, optim)
    return [k for m in modules for name, k in vars(m).items() if name.endswith("_kernel")]


def test_half_precision_ends_where_single_does() -> None:
    """Within 0.1 dB, the bound under which `auto` takes fp16 on a GPU; short, for the interpreter."""
    recipe = sf.recipe("paper", steps=15, learning_rate=2e-3, check_every=15)
    ends = [
        sf.fit(scans(12)[:2], "siren", sf.recipe(recipe, precision=p), architecture=ARCHITECTURE,
               implementation="triton").psnr
        for p in ("fp32", "fp16")
    ]  # fmt: skip
    for exact, half in zip(*ends, strict=True):
        assert exact > 12.0
        assert abs(exact - half) <= 0.1


def test_precision_of_a_recipe_is_checked() -> None:
    with pytest.raises(sf.InputError, match="precision: expected one of 'auto', 'fp32'"):
        sf.recipe("paper", precision="fp8")
    with pytest.raises(sf.InputError, match="precision: expected 'fp32' with implementation 'tiled', got 'fp16'"):
        sf.fit(scans(8)[:1], "siren", sf.recipe("paper", steps=1, precision="fp16"), implementation="tiled")

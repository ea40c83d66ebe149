"""Fits of N signals: who stops when, what is kept, what is refused."""

import copy
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.fitting import engine, fitter, stepper
from strainer_fast.fitting.optim import Adam
from strainer_fast.fitting.start import signal_seed


def quick(**changes: object) -> sf.Recipe:
    return sf.recipe("paper", **{"steps": 30, "learning_rate": 1e-3, "check_every": 1} | changes)


@pytest.mark.parametrize("path", ["fused", "per_signal"])
def test_adam_is_pytorchs(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if path == "per_signal":

        def per_signal(self: Adam, p: list, g: list, step: int, rate: float) -> None:
            self._per_signal(p, g, torch.full(self.step.shape, rate, dtype=torch.float64))

        monkeypatch.setattr(Adam, "_fused", per_signal)
    recipe = sf.recipe("paper", learning_rate=3e-3, betas=(0.8, 0.95), eps=1e-6)
    ours = [torch.randn(3, 4, 5), torch.randn(3, 4)]
    theirs = [p.clone().requires_grad_() for p in ours]
    adam = Adam(ours, recipe, num_signals=3)
    peer = torch.optim.Adam(theirs, lr=3e-3, betas=(0.8, 0.95), eps=1e-6)
    for _ in range(20):
        # As batched products give them: transposed in memory.
        gradients = [torch.randn(3, 5, 4).transpose(1, 2), torch.randn(3, 4)]
        adam.update(ours, gradients)
        for p, g in zip(theirs, gradients, strict=True):
            p.grad = g.clone()
        peer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def test_adam_counts_steps_per_signal() -> None:
    recipe = sf.recipe("paper", learning_rate=1e-2)
    together = [torch.zeros(2, 3)]
    adam = Adam(together, recipe, num_signals=2)
    gradients = torch.randn(6, 2, 3)
    for g in gradients[:3]:
        adam.update(together, [g])
    adam.step[1], adam.exp_avg[0][1], adam.exp_avg_sq[0][1], together[0][1] = 0, 0.0, 0.0, 0.0  # slot 1 is refilled
    for g in gradients[3:]:
        adam.update(together, [g])
    alone = [torch.zeros(1, 3)]
    late = Adam(alone, recipe, num_signals=1)
    for g in gradients[3:]:
        late.update(alone, [g[1:]])
    torch.testing.assert_close(together[0][1], alone[0][0])
    assert adam.step.tolist() == [6, 3]


def test_results_describe_the_weights_that_are_kept(
    unseen: list[sf.Signal], encoder: sf.Encoder, tmp_path: Path
) -> None:
    result = sf.fit(unseen[:3], encoder, quick())
    assert len(result) == 3
    assert result.steps == [30] * 3
    assert result.stop_reasons == ["budget"] * 3
    assert result.names == [s.name for s in unseen[:3]]
    assert all(s > 0 for s in result.seconds)
    result.save(tmp_path / "fit.safetensors")
    loaded = sf.FitResult.load(tmp_path / "fit.safetensors")
    assert loaded.signals == result.signals
    for i, scan in enumerate(unseen[:3]):
        for r in (result, loaded):
            mse = (r.module(i)(scan.points()) - scan.samples()).detach().double().square().mean()
            assert r.psnr[i] == pytest.approx(-10 * math.log10(mse), abs=1e-5)
        curve = loaded.curves[i]
        assert len(curve.psnr) == len(curve.seconds) == 31
        assert (np.diff(curve.seconds) >= 0).all()
        assert curve.psnr[-1] == pytest.approx(result.psnr[i], abs=1e-3)
        assert result.psnr[i] > curve.psnr[0]


def test_same_run_same_bits(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    first, second = (sf.fit(unseen[:4], encoder, quick()) for _ in range(2))
    assert all(torch.equal(first.weights[name], second.weights[name]) for name in first.weights)


def test_global_random_state_is_irrelevant(unseen: list[sf.Signal], tiny: sf.Architecture) -> None:
    torch.manual_seed(1)
    first = sf.fit(unseen[0], "siren", quick(steps=3), architecture=tiny)
    torch.manual_seed(2)
    second = sf.fit(unseen[0], "siren", quick(steps=3), architecture=tiny)
    assert first.psnr == second.psnr
    assert first.psnr != sf.fit(unseen[0], "siren", quick(steps=3, seed=9), architecture=tiny).psnr


def test_a_signal_does_not_depend_on_its_company(unseen: list[sf.Signal], tiny: sf.Architecture) -> None:
    together = sf.fit(unseen[:4], "siren", quick(learning_rate=1e-4), architecture=tiny)
    for i in range(4):
        alone = sf.fit(unseen[i], "siren", quick(learning_rate=1e-4), architecture=tiny)
        np.testing.assert_allclose(together.curves[i].psnr, alone.curves[0].psnr, atol=1e-3)


def test_each_signal_stops_at_its_own_target(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    options = {"implementation": "tiled"}
    free = sf.fit(unseen[:5], encoder, quick(steps=120), **options)
    target = float(np.median([c.psnr[60] for c in free.curves]))
    result = sf.fit(unseen[:5], encoder, quick(steps=120), target_psnr=target, **options)
    assert set(result.stop_reasons) == {"target"}
    assert len(set(result.steps)) > 1
    for i in range(5):
        first = int(np.argmax(free.curves[i].psnr >= target))
        assert abs(result.steps[i] - first) <= 1  # company changes the rounding, and a step can decide
        assert result.psnr[i] >= target - 1e-3
        assert len(result.curves[i].psnr) == result.steps[i] + 1
        np.testing.assert_allclose(result.curves[i].psnr[:20], free.curves[i].psnr[:20], atol=0.01)
    ordered = np.argsort(result.steps)
    assert (np.diff(np.array(result.seconds)[ordered]) >= 0).all()


def test_target_is_looked_at_every_check(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    result = sf.fit(unseen[:3], encoder, quick(check_every=7, steps=120), target_psnr=15.0)
    assert all(steps % 7 == 0 for steps in result.steps)
    assert all(psnr >= 15.0 for psnr in result.psnr)


def test_zero_steps_is_the_start(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    result = sf.fit(unseen[0], encoder, quick(steps=0))
    seed = signal_seed(0, unseen[0].fingerprint())
    start = sf.Siren.from_encoder(encoder, 1, generator=torch.Generator().manual_seed(seed))
    assert all(torch.equal(a, b) for a, b in zip(result.module(0).parameters(), start.parameters(), strict=True))
    assert result.steps == [0]


def test_mixed_sizes_and_channels(encoder: sf.Encoder) -> None:
    grey, photos = sf.signals.samples("brain-mri", "test", size=12), sf.signals.samples("photos", "test", size=(10, 14))
    signals = [
        grey[0],
        photos[0],
        grey[1],
        photos[1],
        sf.Signal(torch.rand(1, 1, 1), "dot"),
        sf.Signal(torch.rand(1, 9, 1)),
    ]
    result = sf.fit(signals, encoder, quick(steps=5))
    assert result.names == [s.name for s in signals]
    assert [s.channels for s in result.signals] == [1, 3, 1, 3, 1, 1]
    assert result.weights["head.weight"].shape == (6, 3, 32)
    for i, (s, image) in enumerate(zip(signals, result.render(), strict=True)):
        assert image.shape == s.values.shape
        alone = sf.fit(s, encoder, quick(steps=5))
        assert result.psnr[i] == pytest.approx(alone.psnr[0], abs=0.01)


def test_least_squares_start_is_the_closed_form(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    scan = unseen[0]
    result = sf.fit(scan, encoder, quick(steps=0, start="least_squares"))
    weight, bias = reference.least_squares_heads(encoder(scan.points()), scan.samples()[None], sf.Recipe().ridge)
    network = result.module(0)
    torch.testing.assert_close(network.head.weight, weight[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(network.head.bias, bias[0], rtol=1e-4, atol=1e-4)
    assert result.psnr[0] > sf.fit(scan, encoder, quick(steps=0)).psnr[0] + 3


def test_mean_start(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    network = sf.fit(unseen[0], encoder, quick(steps=0, start="mean")).module(0)
    torch.testing.assert_close(network.head.weight, encoder.decoders["head.weight"].mean(0))
    photo = sf.signals.samples("photos", size=8)[0]
    with pytest.raises(sf.InputError, match="signals of 1 channels, as the pre-training decoders have"):
        sf.fit(photo, encoder, quick(start="mean"))


def test_deep_decoders_start_by_least_squares_too(scans: list[sf.Signal], unseen: list[sf.Signal]) -> None:
    architecture = sf.Architecture(32, 4, num_shared_layers=2)
    encoder = sf.pretrain(
        scans, sf.recipe("paper", pretrain_steps=30, pretrain_learning_rate=1e-3), architecture=architecture
    )
    random, solved, mean = (
        sf.fit(unseen[:2], encoder, quick(steps=0, start=s)) for s in ("random", "least_squares", "mean")
    )
    assert all(s > r + 2 for s, r in zip(solved.psnr, random.psnr, strict=True))
    for name, decoders in encoder.decoders.items():
        torch.testing.assert_close(mean.weights[name][1], decoders.mean(0))


def test_non_finite_loss_keeps_the_last_finite_weights(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference_run = sf.fit(unseen[:3], encoder, quick(steps=6, check_every=4), implementation="tiled")
    compute, calls = stepper.losses_and_gradients, 0

    def poisoned(*args: object) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        nonlocal calls
        losses, gradients = compute(*args)
        if calls == 7:
            losses = losses.clone()
            losses[1] = math.nan
            for g in gradients:
                g[1] = math.nan
        calls += 1
        return losses, gradients

    monkeypatch.setattr(stepper, "losses_and_gradients", poisoned)
    result = sf.fit(unseen[:3], encoder, quick(steps=20, check_every=4), implementation="tiled")
    assert result.stop_reasons == ["budget", "non_finite", "budget"]
    assert result.steps == [20, 6, 20]
    assert len(result.curves[1].psnr) == 7
    for name, w in result.weights.items():
        assert torch.equal(w[1], reference_run.weights[name][1])
        assert torch.isfinite(w).all()
    assert math.isfinite(result.psnr[1])


def test_a_step_that_is_far_too_long_is_survived(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    result = sf.fit(unseen[:2], encoder, quick(learning_rate=1e38))
    assert set(result.stop_reasons) == {"non_finite"}
    assert all(torch.isfinite(w).all() for w in result.weights.values())
    encoder = sf.pretrain(unseen[:2], quick(pretrain_learning_rate=1e38), architecture=encoder.architecture)
    assert encoder.record["stop_reason"] == "non_finite"
    assert all(torch.isfinite(p).all() for p in encoder.parameters())


def test_progress_and_live_networks(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    seen: list[sf.Progress] = []
    measured: list[float] = []

    def look(progress: sf.Progress) -> None:
        seen.append(progress)
        network = progress.module(1)
        mse = reference.mse(network(unseen[1].points()), unseen[1].samples())
        measured.append(float(reference.psnr(mse).detach()))

    sf.fit(unseen[:2], encoder, quick(steps=20, check_every=5), implementation="tiled", on_check=look)
    assert [p.step for p in seen] == [0, 5, 10, 15, 20]
    assert all(p.running == [0, 1] and p.steps == 20 for p in seen)
    np.testing.assert_allclose(measured, [p.psnr[1] for p in seen], atol=1e-3)


def test_ctrl_c_keeps_what_is_there(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitter, "STACK_ELEMENTS", 2 * 256 * 32)  # two signals a stack
    before = signal.getsignal(signal.SIGINT)

    def press(progress: sf.Progress) -> None:
        if progress.running[0] == 2 and progress.step == 10:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)

    with pytest.raises(sf.Interrupted, match="2 of 5 signals finished") as caught:
        sf.fit(unseen[:5], encoder, quick(), on_check=press, implementation="tiled")
    assert signal.getsignal(signal.SIGINT) is before
    partial = caught.value.result
    assert partial.stop_reasons == ["budget", "budget", "interrupted", "interrupted"]
    assert partial.steps == [30, 30, 11, 11]
    full = sf.fit(unseen[:5], encoder, quick(), implementation="tiled")
    resumed = sf.fit(unseen[:5], encoder, quick(), done=partial, implementation="tiled")
    assert all(torch.equal(full.weights[n], resumed.weights[n]) for n in full.weights)


def test_done_with_other_settings_is_refused(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    done = sf.fit(unseen[:2], encoder, quick(steps=2))
    with pytest.raises(sf.InputError, match=r"the settings it was begun with, got recipe\.steps 2 -> 3\."):
        sf.fit(unseen[:2], encoder, quick(steps=3), done=done)
    with pytest.raises(sf.InputError, match="not among the signals, or has changed"):
        sf.fit(unseen[1:2], encoder, quick(steps=2), done=done)


def test_render(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    result = sf.fit(unseen[:2], encoder, quick(steps=5))
    own, large = result.render(), result.render((40, 30))
    assert own[0].shape == (16, 16, 1)
    assert large[1].shape == (40, 30, 1)
    doubled = result.render(31, indices=[1])[0]
    torch.testing.assert_close(doubled[::2, ::2], own[1], atol=1e-5, rtol=0)  # 31 = 2 * 16 - 1 hits the same points
    corner = result.render((6, 6), window=[(-1, -1 / 3), (1 / 3, 1)])[0]
    torch.testing.assert_close(corner, own[0][:6, 10:], atol=1e-4, rtol=0)
    for size, window in (((4,), None), ((4, 0), None), ((4, 4), [(0, 2), (0, 1)]), ((4, 4), [(0.5, 0.5), (0, 1)])):
        with pytest.raises(sf.InputError):
            result.render(size, window=window)


def test_exact_fit_is_infinite_psnr(tmp_path: Path, encoder: sf.Encoder) -> None:
    values = torch.full((1, 1, 1), 0.25)
    result = sf.fit(sf.Signal(values, "dot"), encoder, quick(steps=0, start="least_squares"))
    assert result.psnr == [math.inf]  # one point is solved exactly: weight 0, bias its value
    result.save(tmp_path / "fit.safetensors")
    assert sf.FitResult.load(tmp_path / "fit.safetensors").psnr == [math.inf]


@contextmanager
def products_in_half() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    try:
        yield
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode", "autocast", "device", "products"])
def test_the_callers_modes_change_nothing(mode: str, scans: list[sf.Signal], tiny: sf.Architecture) -> None:
    contexts = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "device": lambda: torch.device("meta"),
        "products": products_in_half,
    }
    for implementation, optimiser in (("tiled", "adam"), ("torch", "adam"), ("tiled", "kfac"), ("tiled", "muon")):

        def run(implementation: str = implementation, optimiser: str = optimiser) -> sf.FitResult:
            own = sf.signals.load(scans[0].values)
            recipe = quick(pretrain_steps=3, steps=3, start="least_squares", optimiser=optimiser, schedule="cosine")
            encoder = sf.pretrain(own, recipe, architecture=tiny, implementation=implementation)
            return sf.fit(own, encoder, recipe, implementation=implementation)

        expected = run()
        state = torch.get_rng_state()
        with contexts[mode]():
            result = run()
        assert torch.equal(torch.get_rng_state(), state)
        assert all(torch.equal(a, b) for a, b in zip(result.weights.values(), expected.weights.values(), strict=True))
        assert all(p.requires_grad for p in result.module(0).parameters())


@pytest.mark.parametrize("start", ["random", "least_squares", "mean"])
def test_an_encoder_in_float64_fits_in_float32(start: str, encoder: sf.Encoder, unseen: list[sf.Signal]) -> None:
    double = copy.deepcopy(encoder).double()
    result = sf.fit(unseen[0], double, quick(steps=3, start=start))
    expected = sf.fit(unseen[0], encoder, quick(steps=3, start=start))
    assert result.weights["head.weight"].dtype == torch.float32
    assert result.psnr[0] == pytest.approx(expected.psnr[0], abs=1e-3)


def test_each_signal_is_handed_over_when_it_stops(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    seen: list[list[str]] = []
    result = sf.fit(
        unseen[:5],
        encoder,
        quick(steps=150),
        target_psnr=20.0,
        on_result=lambda r: seen.append(r.names),
        implementation="tiled",
    )
    assert len(set(result.steps)) == len(seen) > 1
    assert seen[-1] == result.names
    assert all(set(a) < set(b) for a, b in pairwise(seen))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda e, s: sf.fit(sf.Signal(torch.rand(4, 4, 4, 1)), e),
            "2 coordinates per point, as the encoder has, got 3",
        ),
        (lambda e, s: sf.fit([s, sf.Signal(torch.rand(9, 1))], e), "one input dimension for all"),
        (lambda e, s: sf.fit(s, e, "papr"), "recipe: expected one of 'paper'"),
        (
            lambda e, s: sf.fit(s, e, implementation="warp"),
            "implementation: expected one of 'auto', 'triton', 'native', 'tiled', 'torch'",
        ),
        (lambda e, s: sf.fit(s, e, device="cuda:7"), "device: expected a device that is here"),
        (lambda e, s: sf.fit(s, e, device="gpu"), "device"),
        (lambda e, s: sf.fit(s, e, target_psnr=-1.0), "target_psnr"),
        (lambda e, s: sf.fit(s, 3), "init: expected an Encoder"),
        (lambda e, s: sf.fit(s, "no-such-file"), "no-such-file, which is no file"),
        (
            lambda e, s: sf.fit(s, "siren", sf.recipe("paper", start="mean")),
            "'random' or 'least_squares' for a SIREN that was not trained",
        ),
        (lambda e, s: sf.fit(s, e, architecture=sf.Architecture(8)), "the encoder brings its own"),
        (lambda e, s: sf.fit([], e), "at least one"),
    ],
)
def test_unusable_input(call: object, message: str, encoder: sf.Encoder, unseen: list[sf.Signal]) -> None:
    with pytest.raises(sf.InputError, match=message):
        call(encoder, unseen[0])


def test_a_signal_too_large_for_the_memory_is_refused(encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "available_bytes", lambda device: 2**20)
    with pytest.raises(
        sf.InputError, match=r"signal 'big' of 200x200 points: expected a step that fits .* smaller size"
    ):
        sf.fit(sf.Signal(torch.rand(200, 200, 1), "big"), encoder, implementation="torch")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory that Linux keeps")
@pytest.mark.parametrize("implementation", ["torch", "tiled"])
def test_step_memory_estimate_covers_what_a_step_takes(implementation: str) -> None:
    code = """
import re, sys, torch, strainer_fast as sf
from strainer_fast.fitting.engine import step_bytes
from strainer_fast.ops import losses_and_gradients
def kilobytes(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
m = sf.BatchedSiren(1, 2, 128, 5, 1)
x = sf.signals.grid((300, 300)); y = torch.rand(1, 90000, 1)
losses_and_gradients(sys.argv[1], x[:1000], y[:, :1000], list(m.parameters()), m.omegas, True)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = kilobytes("VmRSS")
losses_and_gradients(sys.argv[1], x, y, list(m.parameters()), m.omegas, True)
print((kilobytes("VmHWM") - before) * 1024 / step_bytes(sys.argv[1], 90000, 1, 1, False, sf.Architecture(128, 5, 4)))
"""
    command = [sys.executable, "-c", code, implementation]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert {"torch": 0.4, "tiled": 0.1}[implementation] < float(done.stdout) <= 1.05


def test_recipes_are_checked() -> None:
    assert sf.recipe("paper") == sf.Recipe()
    assert sf.Recipe(**sf.Recipe(seed=3).as_dict()) == sf.Recipe(seed=3)
    paper = sf.Recipe()
    assert (paper.steps, paper.pretrain_steps, paper.learning_rate, paper.start) == (2000, 5000, 1e-4, "random")
    for changes, message in (
        ({"steps": -1}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"start": "magic"}, "start: expected one of 'random', 'least_squares', 'mean', got 'magic'"),
        ({"check_every": 0}, "check_every"),
        ({"seed": -1}, "seed"),
        ({"stepz": 3}, "stepz"),
    ):
        with pytest.raises(sf.InputError, match=message):
            sf.recipe("paper", **changes)

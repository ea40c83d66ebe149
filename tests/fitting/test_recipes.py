"""What a recipe's fields do in fits and in pre-training: freezing, sampling, exactness, weight scale, meta-learning."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.fitting import PRESETS
from strainer_fast.fitting.freeze import FrozenFeatures, depth_of, stable_rank
from strainer_fast.fitting.meta import MetaStepper
from strainer_fast.fitting.optim import Adam
from strainer_fast.fitting.presets import PURPOSES, REASONS
from strainer_fast.fitting.sampling import Sampler, share

LOOKED = {"check_every": 1, "steps": 20}


def changed(**fields: object) -> sf.Recipe:
    return sf.recipe("paper", **{"learning_rate": 1e-3} | LOOKED | fields)


def test_every_preset_says_what_it_is_for_and_why() -> None:
    paper = PRESETS["paper"].as_dict()
    assert set(PURPOSES) == set(PRESETS)
    assert sf.recipe().name == "fast"
    for name, preset in PRESETS.items():
        different = {field for field, value in preset.as_dict().items() if value != paper[field]} - {"name"}
        assert set(REASONS.get(name, {})) == different
        assert sf.Recipe(**preset.as_dict()) == preset


@pytest.mark.parametrize("name", [n for n in PRESETS if n != "paper"])
@pytest.mark.parametrize("init", ["encoder", "siren"])
def test_presets_fit_from_anything(
    name: str, init: str, unseen: list[sf.Signal], encoder: sf.Encoder, tiny: sf.Architecture
) -> None:
    recipe = sf.recipe(name, steps=30)
    if init == "encoder":
        result = sf.fit(unseen[0], encoder, recipe)
    else:
        result = sf.fit(unseen[0], "siren", recipe, architecture=tiny)
    curve = result.curves[0].psnr
    assert result.psnr[0] > curve[0] + 3


@pytest.mark.parametrize("optimiser", ["adam", "muon", "kfac"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_frozen_layers_stay_and_the_rest_learns(
    depth: int, optimiser: str, unseen: list[sf.Signal], encoder: sf.Encoder
) -> None:
    rates = {"adam": 1e-3, "muon": 1e-3, "kfac": 0.05}
    recipe = changed(freeze=depth, optimiser=optimiser, learning_rate=rates[optimiser])
    result = sf.fit(unseen[:2], encoder, recipe)
    for i, layer in enumerate(encoder.layers):
        for n in range(2):
            same = torch.equal(result.weights[f"layers.{i}.weight"][n], layer.weight.detach())
            assert same == (i < depth)
    assert min(result.psnr) > 8
    network = result.module(1)
    error = reference.mse(network(unseen[1].points()), unseen[1].samples()).detach()
    assert float(reference.psnr(error)) == pytest.approx(result.psnr[1], abs=1e-3)


def test_freezing_is_leaving_gradients_out(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    recipe = changed(freeze=2, steps=10)
    ours = sf.fit(unseen[0], encoder, recipe)
    network = sf.fit(unseen[0], encoder, changed(steps=0)).module(0)
    trained = [p for name, p in network.named_parameters() if not name.startswith(("layers.0", "layers.1"))]
    adam = torch.optim.Adam(trained, lr=1e-3)
    losses = []
    for _ in range(11):
        loss = reference.mse(network(unseen[0].points()), unseen[0].samples())
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    np.testing.assert_allclose(10 ** (-ours.curves[0].psnr / 10), losses, rtol=1e-4)


def test_features_of_frozen_layers_are_computed_once_for_all_signals(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    layer = reference.sine_linear
    monkeypatch.setattr(reference, "sine_linear", lambda x, *rest: calls.append(len(x)) or layer(x, *rest))
    frozen = FrozenFeatures(encoder, 2)
    points = unseen[0].points()
    first, again = frozen.of((16, 16), points), frozen.of((16, 16), points)
    assert first is again
    assert calls == [256, 256]
    torch.testing.assert_close(first, encoder.layers[1](encoder.layers[0](points)).detach())
    FrozenFeatures(encoder, 1).of((16, 16), points.to("meta"))  # another device
    assert all(p.device.type == "cpu" for p in encoder.parameters())


def test_stable_rank_chooses_the_layer(encoder: sf.Encoder) -> None:
    assert stable_rank(torch.eye(7)) == pytest.approx(7)
    assert stable_rank(torch.outer(torch.rand(5), torch.rand(4))) == pytest.approx(1)
    ranks = [stable_rank(layer.weight) for layer in encoder.layers]
    assert depth_of("stable_rank", encoder) == min(1 + int(np.argmax(ranks)), 2)
    assert depth_of("stable_rank", encoder.architecture) == 0
    with pytest.raises(sf.InputError, match="at most the encoder's 3 layers"):
        depth_of(4, encoder)


@pytest.mark.parametrize("sampling", ["random", "lattice", "error"])
def test_a_step_on_some_points_and_psnr_on_all(sampling: str, unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    recipe = changed(sampling=sampling, batch_points=0.25, check_every=5, steps=22)
    result = sf.fit(unseen[:2], encoder, recipe)
    for curve, psnr in zip(result.curves, result.psnr, strict=True):
        assert np.isfinite(curve.psnr[[0, 5, 10, 15, 20, 22]]).all()
        assert curve.psnr[-1] == pytest.approx(psnr, abs=1e-3)
        assert curve.psnr[-1] > curve.psnr[0]
    again = sf.fit(unseen[:2], encoder, recipe)
    assert again.psnr == result.psnr


@pytest.mark.parametrize("sampling", ["lattice", "error"])
def test_signals_that_sample_do_not_see_each_other(sampling: str, unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    recipe = changed(sampling=sampling)
    together = sf.fit(unseen[:2], encoder, recipe)
    assert sf.fit(unseen[1], encoder, recipe).psnr[0] == together.psnr[1]


def test_a_lattice_has_a_point_in_every_cell() -> None:
    recipe = sf.recipe("paper", sampling="lattice", batch_points=0.25)
    sampler = Sampler(recipe, (10, 17), torch.device("cpu"))
    chosen = sampler.draw(3)
    assert torch.equal(chosen, sampler.draw(3))
    assert not torch.equal(chosen, sampler.draw(4))
    assert len(set(chosen.tolist())) == 5 * 8
    edges = torch.arange(9) * 17 // 8
    unshifted = []  # some shift of rows and columns brings one point into each cell
    for down in range(10):
        for right in range(17):
            rows, columns = (chosen // 17 + down) % 10, (chosen % 17 + right) % 17
            cells = (rows // 2) * 8 + torch.searchsorted(edges[1:], columns, right=True)
            unshifted.append(sorted(cells.tolist()) == list(range(5 * 8)))
    assert any(unshifted)
    drawn = torch.bincount(torch.cat([sampler.draw(step) for step in range(3000)]), minlength=170)
    assert drawn.min() > 0.8 * drawn.float().mean()  # all are as likely
    assert drawn.max() < 1.2 * drawn.float().mean()
    line = Sampler(recipe, (1, 64), torch.device("cpu"))
    assert len(line.draw(0)) == 16


def test_points_are_drawn_where_the_error_is() -> None:
    sampler = Sampler(sf.recipe("paper", sampling="error", batch_points=0.5), (20, 20), torch.device("cpu"))
    errors = torch.zeros(400)
    errors[:40] = 1.0
    sampler.look(10.0, errors)
    sampler.look(10.0, torch.full((400,), math.nan))  # a spike teaches nothing
    drawn = sampler.draw(0)
    assert len(drawn) == 200
    assert 100 <= int((drawn < 40).sum()) < 140


def test_the_share_of_points_grows_with_progress() -> None:
    recipe = sf.recipe("paper", sampling="random", batch_points=0.25)
    at = (-math.inf, math.nan, 10, 29, 31, 41, 60, math.inf)
    assert [share(recipe, p) for p in at] == [0.25, 0.25, 0.25, 0.25, 0.5, 1.0, 1.0, 1.0]
    sampler = Sampler(recipe, (8, 8), torch.device("cpu"))
    sampler.look(31.0, None)
    assert len(sampler.draw(0)) == 32
    sampler.look(45.0, None)
    assert sampler.draw(0) is None


def test_a_fit_stops_when_every_rounded_value_is_right(encoder: sf.Encoder) -> None:
    levels = torch.randint(0, 256, (8, 8, 1), generator=torch.Generator().manual_seed(0))
    signal = sf.Signal(levels / 255)
    result = sf.fit(signal, encoder, sf.recipe("fast", freeze=0, until_exact=True, steps=400))
    assert result.stop_reasons == ["exact"]
    assert torch.equal((result.render()[0].clamp(0, 1) * 255).round().long(), levels)
    before = sf.fit(signal, encoder, sf.recipe("fast", freeze=0, steps=result.steps[0] - 1))
    assert not torch.equal((before.render()[0].clamp(0, 1) * 255).round().long(), levels)


def test_weight_scale_is_of_hidden_layers_of_new_networks(
    unseen: list[sf.Signal], encoder: sf.Encoder, tiny: sf.Architecture
) -> None:
    plain, scaled = (
        sf.fit(unseen[0], "siren", changed(steps=0, weight_scale=s), architecture=tiny).weights for s in (1.0, 2.0)
    )
    for name, w in plain.items():
        factor = 2.0 if name in ("layers.1.weight", "layers.2.weight") else 1.0
        torch.testing.assert_close(scaled[name], factor * w)
    kept = sf.fit(unseen[0], encoder, changed(steps=0, weight_scale=2.0)).weights
    assert torch.equal(kept["layers.1.weight"][0], encoder.layers[1].weight.detach())
    small, large = (
        sf.pretrain(unseen[:2], sf.recipe("paper", pretrain_steps=0, pretrain_weight_scale=s), architecture=tiny)
        for s in (1.0, 3.0)
    )
    torch.testing.assert_close(large.layers[2].weight, 3 * small.layers[2].weight)
    torch.testing.assert_close(large.layers[0].weight, small.layers[0].weight)


@pytest.mark.parametrize(
    "changes",
    [
        {"pretrain_optimiser": "muon", "pretrain_learning_rate": 1e-3, "pretrain_schedule": "cosine"},
        {"pretrain_optimiser": "kfac", "pretrain_learning_rate": 0.03},
        {"pretrain_method": "maml", "pretrain_learning_rate": 1e-3},
        {"pretrain_method": "reptile", "pretrain_learning_rate": 1e-3},
    ],
    ids=["muon", "kfac", "maml", "reptile"],
)
def test_pretraining_learns_and_continues_to_the_bit(
    changes: dict[str, object], scans: list[sf.Signal], tiny: sf.Architecture, tmp_path: Path
) -> None:
    recipe = sf.recipe("paper", pretrain_steps=16, check_every=1, **changes)
    first: list[float] = []
    whole = sf.pretrain(
        scans[:4], recipe, architecture=tiny, on_check=lambda p: first.append(p.psnr[0]) if p.step == 0 else None
    )
    assert whole.record["psnr"][0] > first[0] + 1

    class Stop(Exception):
        pass

    def stop(progress: sf.Progress) -> None:
        if progress.step == 9:
            raise Stop

    path = tmp_path / "run.checkpoint"
    with pytest.raises(Stop):
        sf.pretrain(scans[:4], recipe, architecture=tiny, checkpoint=path, checkpoint_seconds=0, on_check=stop)
    resumed = sf.pretrain(scans[:4], recipe, architecture=tiny, checkpoint=path)
    assert resumed.fingerprint() == whole.fingerprint()
    assert resumed.record["psnr"] == whole.record["psnr"]


@pytest.mark.parametrize("method", ["maml", "reptile"])
def test_meta_gradients(method: str, scans: list[sf.Signal]) -> None:
    """MAML's against finite differences of what it minimises; Reptile's is the way that its inner steps go."""
    torch.manual_seed(0)
    points, values = scans[0].points().double(), torch.stack([s.samples() for s in scans[:3]]).double()
    layers = [torch.rand(6, 2) - 0.5, torch.rand(6), 0.1 * torch.rand(1, 1, 6), torch.rand(1, 1)]
    parameters = [p.double() for p in layers]
    recipe = sf.recipe("paper", pretrain_method=method, inner_learning_rate=0.02, meta_batch=3)
    stepper = MetaStepper(
        points, values, parameters, (5.0,), Adam(parameters, recipe, None), "torch", "fp32", False, True
    )

    def after(start: list[torch.Tensor], n: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        now = [p.detach().clone().requires_grad_() for p in start]
        for _ in range(2):
            loss = reference.mse(reference.siren(points, now[::2], now[1::2], (5.0,)), values[n : n + 1]).sum()
            now = [
                (p - 0.02 * g).detach().requires_grad_()
                for p, g in zip(now, torch.autograd.grad(loss, now), strict=True)
            ]
        return reference.mse(reference.siren(points, now[::2], now[1::2], (5.0,)), values[n : n + 1]).sum(), now

    loss = stepper.evaluate(0, True)
    torch.testing.assert_close(loss, torch.stack([after(parameters, n)[0] for n in range(3)]).mean().expand(3))
    if method == "reptile":
        ends = [after(parameters, n)[1] for n in range(3)]
        for i, g in enumerate(stepper._gradients):
            expected = torch.stack([(parameters[i] - end[i]) / 0.04 for end in ends]).mean(0)
            torch.testing.assert_close(g, expected)
        return
    for i, at in ((0, (2, 1)), (1, (3,)), (2, (0, 0, 4))):
        sides = []
        for sign in (1, -1):
            moved = [p.clone() for p in parameters]
            moved[i][at] += sign * 1e-5
            sides.append(torch.stack([after(moved, n)[0] for n in range(3)]).mean())
        torch.testing.assert_close(stepper._gradients[i][at], (sides[0] - sides[1]) / 2e-5, rtol=1e-5, atol=1e-9)


def test_a_meta_learned_start_is_better_than_a_random_one(
    scans: list[sf.Signal], unseen: list[sf.Signal], tiny: sf.Architecture
) -> None:
    recipe = sf.recipe("paper", pretrain_method="reptile", pretrain_steps=80, pretrain_learning_rate=1e-3)
    encoder = sf.pretrain(scans, recipe, architecture=tiny)
    assert encoder.decoders["head.weight"].shape[0] == 1
    meta = sf.fit(unseen[0], encoder, changed(start="mean", learning_rate=1e-4))
    siren = sf.fit(unseen[0], "siren", changed(learning_rate=1e-4), architecture=tiny)
    assert meta.psnr[0] > siren.psnr[0] + 3


@pytest.mark.parametrize("kind", ["uniform", "gaussian", "spectrum", "dead-leaves"])
def test_noise(kind: str) -> None:
    first = sf.signals.noise(kind, 3, (24, 20), channels=2, seed=4)
    assert [s.name for s in first] == [f"noise-{kind}-{i}" for i in range(3)]
    assert first[0].values.shape == (24, 20, 2)
    assert torch.equal(sf.signals.noise(kind, 1, (24, 20), channels=2, seed=4)[0].values, first[0].values)
    assert not torch.equal(first[0].values, first[1].values)
    assert float(first[0].values.std()) > 0.1
    quiet = sf.signals.noise(kind, 1, (24, 20), channels=2, seed=4, amplitude=0.1)[0].values
    torch.testing.assert_close(quiet - 0.5, 0.1 * (first[0].values - 0.5), atol=0.03, rtol=0)
    assert len(sf.signals.noise(kind, 1, 8)[0].shape) == 2
    if kind != "dead-leaves":
        assert sf.signals.noise(kind, 1, (4, 5, 6))[0].values.shape == (4, 5, 6, 1)


def test_spectra_of_noise() -> None:
    def slope(kind: str) -> float:
        """Of log amplitude over log frequency, along the first row of frequencies."""
        values = torch.stack([s.values[..., 0] for s in sf.signals.noise(kind, 20, 64)])
        amplitude = torch.fft.fft2(values).abs().square().mean(0).sqrt()[0, 1:32]
        return float(np.polyfit(np.log(np.arange(1, 32)), np.log(amplitude.numpy()), 1)[0])

    assert slope("spectrum") == pytest.approx(-1, abs=0.25)
    assert slope("uniform") == pytest.approx(0, abs=0.25)
    assert slope("dead-leaves") < -0.7


@pytest.mark.parametrize(
    "call",
    [
        lambda: sf.signals.noise("white"),
        lambda: sf.signals.noise("uniform", 0),
        lambda: sf.signals.noise("uniform", 1, 0),
        lambda: sf.signals.noise("uniform", 1, 8, amplitude=2.0),
    ],
)
def test_bad_noise(call: Callable[[], object]) -> None:
    with pytest.raises((sf.InputError, sf.InputTypeError)):
        call()


def test_least_squares_from_sums_is_the_formula(
    unseen: list[sf.Signal], encoder: sf.Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from strainer_fast.fitting import start

    monkeypatch.setattr(start, "CHUNK", 100)
    points, values = unseen[0].points(), torch.stack([s.samples() for s in unseen[:2]])
    stack = start.initial_stack(encoder, 2, 1, [1, 2])
    start.least_squares_start(stack, points, values, 1e-4)
    weight, bias = reference.least_squares_heads(encoder(points).detach(), values, 1e-4)
    torch.testing.assert_close(stack.head.weight.detach(), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stack.head.bias.detach(), bias, rtol=1e-4, atol=1e-5)


def test_sampling_by_error_survives_a_spike(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    recipe = sf.recipe("paper", sampling="error", guard_db=3.0, learning_rate=1e38, steps=12, check_every=1)
    assert sf.fit(unseen[0], encoder, recipe).stop_reasons == ["diverged"]


def test_weights_grow_with_the_grid(unseen: list[sf.Signal], tiny: sf.Architecture) -> None:
    from strainer_fast.fitting.start import resolve_scale

    assert resolve_scale(2.5, (9, 9)) == 2.5
    scales = [resolve_scale("auto", (n, n)) for n in (8, 48, 178, 10_000)]
    assert scales == [1.0, pytest.approx(1.248, abs=1e-3), pytest.approx(2.0), 3.0]
    assert resolve_scale("auto", (178, 178, 178)) == pytest.approx(2.0)
    large = sf.Signal(torch.rand(60, 60, 1))
    plain, scaled = (
        sf.fit(large, "siren", changed(steps=0, weight_scale=s), architecture=tiny).weights for s in (1.0, "auto")
    )
    factor = resolve_scale("auto", (60, 60))
    torch.testing.assert_close(scaled["layers.2.weight"], factor * plain["layers.2.weight"])
    with pytest.raises(sf.InputError, match="'auto'"):
        sf.recipe("paper", weight_scale="large")


def test_the_default_recipe_is_no_noise_between_the_samples() -> None:
    full = sf.signals.samples("brain-mri", "test", size=64)[4].values[:63, :63]
    half = sf.Signal(full[::2, ::2].contiguous())
    network = sf.Architecture(64, 5, 4)
    result = sf.fit(half, "siren", sf.recipe("fast", steps=60), target_psnr=40.0, architecture=network)
    unseen = torch.ones(63, 63, dtype=torch.bool)
    unseen[::2, ::2] = False
    error = (result.render((63, 63))[0] - full)[unseen].square().mean()
    assert result.psnr[0] >= 40
    assert float(-10 * torch.log10(error)) > 18

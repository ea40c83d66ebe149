"""K-FAC and Muon: what their steps are, and that networks of a stack do not see each other."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.fitting.kfac import Kfac, _factors
from strainer_fast.fitting.muon import Muon, orthogonalise
from strainer_fast.fitting.optim import Optimiser
from strainer_fast.fitting.optimisers import make_optimiser

OMEGAS = (30.0, 10.0)
KFAC = {"optimiser": "kfac", "learning_rate": 0.03, "check_every": 1}
MUON = {"optimiser": "muon", "learning_rate": 3e-4, "check_every": 1}


def stack(num: int, channels: int = 2, width: int = 8) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Points, values and parameters of `num` networks with two sine layers."""
    network = sf.BatchedSiren(num, 2, width, 3, channels, OMEGAS)
    generator = torch.Generator().manual_seed(3)
    network.reset_parameters(generator)
    points = sf.signals.grid((9, 9))
    return points, torch.rand(num, 81, channels, generator=generator), [p.detach() for p in network.parameters()]


def gradients_of(points: Tensor, values: Tensor, parameters: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    leaves = [p.clone().requires_grad_() for p in parameters]
    losses = reference.mse(reference.siren(points, leaves[::2], leaves[1::2], OMEGAS), values)
    return losses.detach(), list(torch.autograd.grad(losses.sum(), leaves))


def steps(optimiser: Optimiser, points: Tensor, values: Tensor, parameters: list[Tensor], number: int) -> list[Tensor]:
    """Losses before each step; parameters move in place."""
    losses = []
    for _ in range(number):
        loss, gradients = gradients_of(points, values, parameters)
        losses.append(optimiser.settle(parameters, loss, gradients).clone())
        optimiser.update(parameters, gradients)
    return losses


def test_factors_are_the_moments_of_inputs_and_of_derivatives() -> None:
    points, _, parameters = stack(1, channels=1)
    plain = [p.double() for p in parameters]
    points = points.double()
    found = _factors(points, plain, OMEGAS, torch.ones(81, 1, dtype=torch.float64))
    weights, biases = [p[0] for p in plain[::2]], [p[0] for p in plain[1::2]]

    def tail(z: Tensor, layer: int) -> Tensor:
        """The value of one point from the pre-activation of a layer on."""
        for i in range(layer, 2):
            z = torch.nn.functional.linear(torch.sin(OMEGAS[i] * z), weights[i + 1], biases[i + 1])
        return z.sum()

    h = points
    for layer in range(2):
        z = torch.nn.functional.linear(h, weights[layer], biases[layer])
        slopes = torch.stack([torch.func.grad(tail)(each, layer) for each in z])
        joined = torch.cat([h, torch.ones(81, 1, dtype=torch.float64)], 1)
        inputs = found[layer][0] if layer == 0 else found[layer][0][0]  # points are the same for all networks
        torch.testing.assert_close(inputs, joined.T @ joined / 81)
        torch.testing.assert_close(found[layer][1][0], slopes.T @ slopes / 81)
        h = torch.sin(OMEGAS[layer] * z)


def test_random_signs_have_the_sum_over_heads_as_their_expectation() -> None:
    """All combinations of signs, once each: what a sample of them estimates."""
    torch.manual_seed(0)
    points = sf.signals.grid((3, 3)).double()
    layers = [(torch.rand(5, 2), torch.rand(5)), (torch.rand(3, 2, 5), torch.rand(3, 2))]
    parameters = [p.double() for pair in layers for p in pair]
    signs = torch.tensor(list(product((-1.0, 1.0), repeat=6)), dtype=torch.float64)
    many = _factors(points.repeat_interleave(64, 0), parameters, OMEGAS[:1], signs.repeat(9, 1))
    total = sum(
        _factors(points, [*parameters[:2], parameters[2][n : n + 1, c : c + 1], parameters[3][n : n + 1, c : c + 1]],
                 OMEGAS[:1], torch.ones(9, 1, dtype=torch.float64))[0][1]
        for n in range(3) for c in range(2)
    )  # fmt: skip
    torch.testing.assert_close(many[0][1], total)


def test_a_step_on_a_linear_layer_solves_least_squares() -> None:
    torch.manual_seed(0)
    points, values = torch.rand(200, 6), torch.rand(1, 200, 3)
    parameters = [torch.zeros(1, 3, 6), torch.zeros(1, 3)]
    recipe = sf.recipe("paper", optimiser="kfac", learning_rate=1.0, momentum=0.0, damping=1e-12)
    optimiser = Kfac(parameters, recipe, 1, points, ())
    residual = reference.multi_head_linear(points, *parameters) - values
    gradients = [2 / values.numel() * residual.mT @ points, 2 / values.numel() * residual.sum(1)]
    optimiser.update(parameters, gradients)
    weight, bias = reference.least_squares_heads(points, values, 0.0)
    torch.testing.assert_close(parameters[0], weight, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(parameters[1], bias, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("settings", [KFAC, MUON, {"learning_rate": 1e-3}], ids=["kfac", "muon", "adam"])
def test_networks_of_a_stack_do_not_see_each_other(settings: dict[str, object]) -> None:
    recipe = sf.recipe("paper", **settings, refresh_every=2, schedule="cosine", steps=8)
    points, values, together = stack(3)
    alone = [p[1:2].clone() for p in together]
    of_three = make_optimiser(together, recipe, 3, points, OMEGAS)
    of_one = make_optimiser(alone, recipe, 1, points, OMEGAS)
    steps(of_three, points, values, together, 6)
    steps(of_one, points, values[1:2], alone, 6)
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a[1:2], b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [KFAC, MUON], ids=["kfac", "muon"])
def test_a_signal_that_leaves_takes_only_its_own_state_along(settings: dict[str, object]) -> None:
    recipe = sf.recipe("paper", **settings)
    points, values, parameters = stack(3)
    twin = [p.clone() for p in parameters]
    whole, reduced = (make_optimiser(p, recipe, 3, points, OMEGAS) for p in (parameters, twin))
    steps(whole, points, values, parameters, 6)
    steps(reduced, points, values, twin, 3)
    rest = torch.tensor([0, 2])
    reduced.select(rest)
    twin = [p[rest] for p in twin]
    steps(reduced, points, values[rest], twin, 3)
    for a, b in zip(parameters, twin, strict=True):
        torch.testing.assert_close(a[rest], b, rtol=1e-4, atol=1e-5)


def test_kfac_never_lets_a_loss_rise() -> None:
    recipe = sf.recipe("paper", **KFAC | {"learning_rate": 3.0})  # far too long
    points, values, parameters = stack(2)
    optimiser, last, taken_back = Kfac(parameters, recipe, 2, points, OMEGAS), None, 0
    for _ in range(25):
        loss, gradients = gradients_of(points, values, parameters)
        settled = optimiser.settle(parameters, loss, gradients)
        again, fresh = gradients_of(points, values, parameters)  # of the weights that are in place now
        torch.testing.assert_close(settled, again)
        for g, expected in zip(gradients, fresh, strict=True):
            torch.testing.assert_close(g, expected)
        if last is not None:
            assert (again <= last).all()
            for n in torch.nonzero(loss > last).flatten().tolist():
                taken_back += 1
                assert all(float(v[n].abs().max()) == 0 for v in optimiser.velocity)
        last = again
        optimiser.update(parameters, gradients)
    assert taken_back > 0
    assert (optimiser.rate < 1).all()
    first, _ = gradients_of(*stack(2))
    assert (last < 0.9 * first).all()


def test_kfac_takes_a_step_to_infinity_back() -> None:
    recipe = sf.recipe("paper", **KFAC | {"learning_rate": 1e38})
    points, values, parameters = stack(1)
    start = [p.clone() for p in parameters]
    optimiser = Kfac(parameters, recipe, 1, points, OMEGAS)
    steps(optimiser, points, values, parameters, 1)
    loss, gradients = gradients_of(points, values, parameters)
    assert not torch.isfinite(loss).all()
    settled = optimiser.settle(parameters, loss, gradients)
    assert torch.isfinite(settled).all()
    assert all(torch.equal(a, b) for a, b in zip(parameters, start, strict=True))
    optimiser.rate.fill_(1e-40)
    optimiser.update(parameters, gradients)
    losses = steps(optimiser, points, values, parameters, 4)
    assert losses[-1] < settled


def test_kfac_goes_on_after_gradients_that_overflowed() -> None:
    points, values, parameters = stack(2)
    optimiser = Kfac(parameters, sf.recipe("paper", **KFAC), 2, points, OMEGAS)
    before = steps(optimiser, points, values, parameters, 3)
    loss, gradients = gradients_of(points, values, parameters)
    gradients[2][0, 0, 0] = float("inf")  # of the first network
    optimiser.settle(parameters, loss, gradients)
    optimiser.update(parameters, gradients)
    after = steps(optimiser, points, values, parameters, 4)
    assert torch.isfinite(after[-1]).all()
    assert (after[-1] < before[-1]).all()


def test_a_schedule_goes_on_after_a_roll_back() -> None:
    recipe = sf.recipe("paper", schedule="cosine", steps=10, learning_rate=1.0)
    points, values, parameters = stack(2)
    adam = make_optimiser(parameters, recipe, 2, points, OMEGAS)
    steps(adam, points, values, parameters, 5)
    adam.restart(1)
    first, second = adam.learning_rate().tolist()
    assert second == pytest.approx(first / 2)
    assert adam.step.tolist() == [5, 0]


def test_muon_takes_a_hidden_matrix_that_now_comes_first() -> None:
    _, _, parameters = stack(1)
    recipe = sf.recipe("paper", optimiser="muon")
    assert list(Muon(parameters, recipe, 1).hidden) == [2]
    assert list(Muon(parameters[2:], recipe, 1, num_frozen=1).hidden) == [0]
    assert list(Muon(parameters[4:], recipe, 1, num_frozen=2).hidden) == []


def test_kfac_beats_adam_by_far_on_a_scan(scans: list[sf.Signal], encoder: sf.Encoder) -> None:
    ours = sf.fit(scans[0], encoder, sf.recipe("paper", **KFAC, start="least_squares", steps=30))
    adam = sf.fit(scans[0], encoder, sf.recipe("paper", start="least_squares", steps=30, learning_rate=1e-3))
    assert ours.psnr[0] > adam.psnr[0] + 2
    assert (np.diff(ours.curves[0].psnr) >= -1e-4).all()


@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 8, 24), (2, 24, 8)])
def test_orthogonalised_matrices_have_singular_values_about_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.min() > 0.3
    assert values.max() < 1.3
    for one, of_stack in zip(x, orthogonalise(x), strict=True):
        torch.testing.assert_close(orthogonalise(one[None])[0], of_stack, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="not run: this PyTorch has no Muon")
def test_muon_is_pytorchs() -> None:
    """PyTorch's iterates in bfloat16, which bounds how close two steps can be."""
    points, values, parameters = stack(1, width=32)
    theirs = [p.clone() for p in parameters]
    hidden = torch.nn.Parameter(theirs[2][0].clone())
    optimiser = torch.optim.Muon([hidden], lr=1e-3, weight_decay=0.0, momentum=0.95, nesterov=True)
    ours = Muon(parameters, sf.recipe("paper", optimiser="muon", learning_rate=1e-3), 1)
    before = parameters[2].clone()
    for _ in range(3):
        _, gradients = gradients_of(points, values, parameters)
        hidden.grad = gradients[2][0].clone()
        optimiser.step()
        ours.update(parameters, gradients)
    moved, expected = parameters[2][0] - before[0], hidden.detach() - before[0]
    assert (moved - expected).norm() < 0.05 * expected.norm()


def test_muon_gives_all_else_to_adam_at_half_the_rate() -> None:
    points, values, parameters = stack(2)
    twin = [p.clone() for p in parameters]
    ours = Muon(parameters, sf.recipe("paper", optimiser="muon", learning_rate=2e-3), 2)
    adam = make_optimiser(twin, sf.recipe("paper", learning_rate=1e-3), 2, points, OMEGAS)
    _, gradients = gradients_of(points, values, parameters)
    ours.update(parameters, gradients)
    adam.update(twin, gradients)
    for i in (0, 1, 3, 4, 5):
        torch.testing.assert_close(parameters[i], twin[i])
    assert not torch.allclose(parameters[2], twin[2])


def test_cosine_warm_up_and_plateau() -> None:
    rates = []
    optimiser = make_optimiser(
        [torch.zeros(1, 2, 2), torch.zeros(1, 2)],
        sf.recipe("paper", learning_rate=1.0, schedule="cosine", steps=105, warmup_steps=5),
        1, torch.zeros(1, 2), (),
    )  # fmt: skip
    for _ in range(105):
        rates.append(float(optimiser.learning_rate()))
        optimiser.advance()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[55] == pytest.approx(0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert float(optimiser.learning_rate()) == pytest.approx(0.02)


def test_a_plateau_halves_the_rate_of_its_own_signal_only(unseen: list[sf.Signal], encoder: sf.Encoder) -> None:
    from strainer_fast.fitting.schedule import MIN_GAIN_DB, PATIENCE, Plateau

    watch = Plateau(2)
    rising, due = np.array([10.0, 20.0]), np.array([True, True])
    assert watch.look(rising, due) == []
    halved = [watch.look(rising + np.array([0.0, (i + 1) * 2 * MIN_GAIN_DB]), due) for i in range(2 * PATIENCE)]
    assert [i for i, rows in enumerate(halved) if rows] == [PATIENCE - 1, 2 * PATIENCE - 1]
    assert all(rows in ([], [0]) for rows in halved)
    flat = sf.recipe("paper", schedule="plateau", learning_rate=3e-2, steps=60, check_every=1)  # bounces
    constant = sf.recipe(flat, schedule="constant")
    assert sf.fit(unseen[0], encoder, flat).psnr[0] > sf.fit(unseen[0], encoder, constant).psnr[0]


def test_bad_settings() -> None:
    for change, message in (
        ({"optimiser": "sgd"}, "optimiser: expected one of 'adam', 'muon', 'kfac'"),
        ({"schedule": "step"}, "schedule"),
        ({"momentum": 1.0}, "momentum"),
        ({"damping": 0.0}, "damping"),
        ({"batch_points": 1.5}, "batch_points"),
        ({"optimiser": "kfac", "sampling": "random"}, "compares each loss"),
        ({"freeze": -1}, "freeze"),
        ({"freeze": "deep"}, "'stable_rank'"),
        ({"betas": "ab"}, "betas"),
        ({"betas": [0.9, None]}, "betas"),
        ({"base": 5}, "Check the spelling"),
        ({"pretrain_schedule": "plateau"}, "has a budget"),
        ({"pretrain_method": "maml", "pretrain_optimiser": "kfac"}, "for meta-learning"),
        ({"until_exact": 1}, "until_exact"),
        ({"pretrain_method": "anil"}, "pretrain_method"),
    ):
        with pytest.raises((sf.InputError, sf.InputTypeError), match=message):
            sf.recipe("paper", **change)
    with pytest.raises(sf.InputTypeError, match="name of a preset"):
        sf.recipe(3)


def test_momentum_of_kfac_follows_what_a_step_leaves_of_the_loss() -> None:
    """Smoothed ratios of each network's own losses, 1 where a step is taken back."""
    points, _, parameters = stack(2)
    optimiser = make_optimiser(parameters, sf.recipe("paper", **KFAC), 2, points, OMEGAS)
    assert isinstance(optimiser, Kfac)
    expected = torch.zeros(2)
    before: list[float] = []
    for losses in ([1.0, 1.0], [0.5, 0.9], [0.25, 0.81], [0.125, 2.0], [float("nan"), 0.729]):
        optimiser.moved = bool(before)
        optimiser.settle(parameters, torch.tensor(losses), [torch.zeros_like(p) for p in parameters])
        if before:
            kept = [a if a <= b else b for a, b in zip(losses, before, strict=True)]
            left = [k / b for k, b in zip(kept, before, strict=True)]
        else:
            kept, left = losses, [0.0, 0.0]
        expected = 0.8 * expected + 0.2 * torch.tensor(left)
        before = kept
    torch.testing.assert_close(optimiser.left, expected)
    optimiser.restart(1)
    assert optimiser.left.tolist() == [pytest.approx(float(expected[0])), 0.0]
    optimiser.left = torch.tensor([0.2, 0.99])
    optimiser.velocity = [torch.ones_like(v) for v in optimiser.velocity]
    optimiser.inverses = [(torch.zeros_like(a), torch.zeros_like(g)) for a, g in optimiser.inverses]
    optimiser.stale[:] = 0
    optimiser.step[:] = 1  # no refresh is due
    optimiser.update(parameters, [torch.zeros_like(p) for p in parameters])
    for v in optimiser.velocity:
        torch.testing.assert_close(v[0], torch.full_like(v[0], 0.5))
        torch.testing.assert_close(v[1], torch.full_like(v[1], 0.95))

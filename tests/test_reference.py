"""The reference formulas against closed forms, finite differences and each other."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from strainer_fast import reference
from strainer_fast._checks import InputError


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_sine_linear_is_the_formula() -> None:
    x, w, b = double(7, 3), double(5, 3), double(5)
    y = reference.sine_linear(x, w, b, omega=11.0)
    expected = np.sin(11.0 * (x.detach().numpy() @ w.detach().numpy().T + b.detach().numpy()))
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-13)


@pytest.mark.parametrize("bias", [True, False])
def test_derivatives_of_any_order(bias: bool) -> None:
    x, w, b, omega = double(3, 2), double(4, 2), double(4), torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    inputs = (x, w, b, omega) if bias else (x, w, omega)

    def layer(*args: Tensor) -> Tensor:
        return reference.sine_linear(args[0], args[1], args[2] if bias else None, args[-1])

    assert torch.autograd.gradcheck(layer, inputs)
    assert torch.autograd.gradgradcheck(layer, inputs)


def test_third_derivative() -> None:
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None].requires_grad_()
    y = reference.sine_linear(x, torch.ones(1, 1, dtype=torch.float64), None, omega=3.0)
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(y, -27 * torch.cos(3 * x))


@pytest.mark.parametrize("shared", [True, False], ids=["shared_input", "own_inputs"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_multi_head_linear_equals_a_loop(shared: bool, bias: bool) -> None:
    x, w, b = double(*(() if shared else (3,)), 6, 4), double(3, 2, 4), double(3, 2) if bias else None
    y = reference.multi_head_linear(x, w, b)
    rows = [torch.nn.functional.linear(x if shared else x[n], w[n], None if b is None else b[n]) for n in range(3)]
    torch.testing.assert_close(y, torch.stack(rows))
    inputs = (x, w) if b is None else (x, w, b)
    assert torch.autograd.gradcheck(reference.multi_head_linear, inputs)
    assert torch.autograd.gradgradcheck(reference.multi_head_linear, inputs)


def test_strainer_equals_separate_networks() -> None:
    points = torch.rand(9, 2, dtype=torch.float64) * 2 - 1
    shared_w, shared_b = [double(5, 2), double(5, 5)], [double(5), double(5)]
    own_w, own_b = [double(3, 5, 5), double(3, 2, 5)], [double(3, 5), double(3, 2)]
    omega = (30.0, 10.0, 5.0)
    together = reference.strainer(points, shared_w, shared_b, own_w, own_b, omega)
    for n in range(3):
        alone = reference.siren(points, [*shared_w, *(w[n] for w in own_w)], [*shared_b, *(b[n] for b in own_b)], omega)
        torch.testing.assert_close(together[n], alone)


def test_stacked_siren_equals_separate_networks() -> None:
    points = torch.rand(9, 2, dtype=torch.float64)
    weights, biases = [double(3, 5, 2), double(3, 5, 5), double(3, 1, 5)], [double(3, 5), double(3, 5), double(3, 1)]
    together = reference.siren(points, weights, biases, 30.0)
    for n in range(3):
        alone = reference.siren(points, [w[n] for w in weights], [b[n] for b in biases], 30.0)
        torch.testing.assert_close(together[n], alone)


def test_mse_is_per_signal_and_psnr_is_unclamped() -> None:
    prediction = torch.tensor([[[0.5], [0.5]], [[3.0], [3.0]], [[0.2], [0.4]]])
    target = torch.tensor([[[0.6], [0.4]], [[1.0], [1.0]], [[0.2], [0.4]]])
    mse = reference.mse(prediction, target)
    torch.testing.assert_close(mse, torch.tensor([0.01, 4.0, 0.0]))
    psnr = reference.psnr(mse)
    torch.testing.assert_close(psnr[:2], torch.tensor([20.0, -10 * math.log10(4.0)]))
    assert psnr[2] == math.inf


@pytest.mark.parametrize("shared", [True, False], ids=["shared_features", "own_features"])
def test_least_squares_heads_solve_the_normal_equations(shared: bool) -> None:
    features, values = torch.randn(*(() if shared else (3,)), 50, 6), torch.randn(3, 50, 2)
    weight, bias = reference.least_squares_heads(features, values, ridge=0.0)
    for n in range(3):
        f = (features if shared else features[n]).double().numpy()
        design = np.concatenate([f, np.ones((50, 1))], axis=1)
        solution, *_ = np.linalg.lstsq(design, values[n].double().numpy(), rcond=None)
        np.testing.assert_allclose(weight[n].numpy(), solution[:6].T, atol=1e-6)
        np.testing.assert_allclose(bias[n].numpy(), solution[6], atol=1e-6)


def test_ridge_shrinks_weights_but_not_the_mean() -> None:
    features, values = torch.randn(50, 6), torch.randn(1, 50, 1) + 5
    loose, _ = reference.least_squares_heads(features, values, ridge=1e-8)
    tight, bias = reference.least_squares_heads(features, values, ridge=1e6)
    assert tight.norm() < 1e-4 * loose.norm()
    torch.testing.assert_close(bias[0], values[0].mean(0), rtol=1e-4, atol=0)


def test_least_squares_of_one_point_and_of_fewer_points_than_features() -> None:
    weight, bias = reference.least_squares_heads(torch.randn(1, 6), torch.full((1, 1, 1), 0.3))
    assert torch.equal(weight, torch.zeros(1, 1, 6))
    torch.testing.assert_close(bias, torch.full((1, 1), 0.3))
    features, values = torch.randn(4, 6), torch.rand(1, 4, 1)
    weight, bias = reference.least_squares_heads(features, values, ridge=1e-9)
    torch.testing.assert_close(reference.multi_head_linear(features, weight, bias), values, atol=1e-4, rtol=0)


def test_least_squares_of_features_that_depend_on_each_other() -> None:
    features = torch.randn(20, 1).expand(20, 3)
    weight, _ = reference.least_squares_heads(features, torch.rand(2, 20, 1))
    assert torch.isfinite(weight).all()
    torch.testing.assert_close(weight[..., :1].expand_as(weight), weight)  # ridge shares it evenly
    with pytest.raises(InputError, match="ridge: expected enough"):
        reference.least_squares_heads(features, torch.rand(2, 20, 1), ridge=0.0)


def test_least_squares_refuses_what_does_not_belong_together() -> None:
    with pytest.raises(InputError, match="the same P"):
        reference.least_squares_heads(torch.zeros(4, 2), torch.zeros(1, 5, 1))
    with pytest.raises(InputError, match="ridge"):
        reference.least_squares_heads(torch.zeros(4, 2), torch.zeros(1, 4, 1), ridge=-1.0)


def test_half_precision_keeps_the_argument_in_float32() -> None:
    # bfloat16 spacing at 60 is 0.25: a z rounded to it would be off by up to 0.12 in the sine.
    x, w = torch.rand(200, 4).bfloat16(), (torch.rand(3, 4) - 0.5).bfloat16()
    y = reference.sine_linear(x, w, None, omega=30.0)
    exact = torch.sin(30.0 * x.double() @ w.double().T)
    assert y.dtype == torch.bfloat16
    assert (y.double() - exact).abs().max() <= 2**-8  # rounding of the result only


def test_omega_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(InputError, match="each of the 1 sine layers"):
        reference.siren(torch.zeros(2, 2), [torch.zeros(3, 2), torch.zeros(1, 3)], [None, None], (30.0, 30.0))

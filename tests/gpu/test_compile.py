"""torch.compile on a GPU, forward and backward in one graph: layers and one-pass losses without a graph break."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import strainer_fast as sf
from strainer_fast.ops import batched_siren_mse, siren_mse, strainer_mse

# The compiler warns about itself, and about tf32, which it would rather have.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]

BACKENDS = ["aot_eager", "inductor"]
POINTS = 300


@pytest.fixture(autouse=True)
def _forget() -> None:
    """Each test compiles anew: what an earlier one compiled counts towards a limit."""
    torch._dynamo.reset()


def layers(implementation: str, precision: str = "fp32") -> nn.Sequential:
    torch.manual_seed(0)
    how: dict[str, Any] = {"implementation": implementation, "precision": precision}
    return nn.Sequential(
        sf.SineLinear(2, 64, is_first=True, **how),
        sf.SineLinear(64, 48, bias=False, **how),
        sf.BatchedSineLinear(3, 48, 40, **how),
        sf.MultiHeadLinear(3, 40, 2, **how),
    ).cuda()


def outcome(model: Callable[[Tensor], Tensor], x: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    """Values, and gradients of the points and of all parameters."""
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *parameters])]


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers(backend: str) -> None:
    model, plain = layers("triton"), layers("torch").double()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for points in (POINTS, 77):  # the second time the number of points is a symbol
        x = (torch.rand(points, 2, device="cuda") * 2 - 1).requires_grad_()
        got, want = outcome(compiled, x, list(model.parameters())), outcome(model, x, list(model.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        exact = outcome(plain, x.detach().double().requires_grad_(), list(plain.parameters()))
        for a, b in zip(got, exact, strict=True):
            assert relative(a, b) <= 1e-4
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:5]), model(x[:5]))


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_rounded_layers(precision: str) -> None:
    model = layers("triton", precision)
    x = (torch.rand(POINTS, 2, device="cuda") * 2 - 1).requires_grad_()
    got, want = (outcome(f, x, list(model.parameters())) for f in (torch.compile(model, fullgraph=True), model))
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) <= 16 * 2.0**-11


def parameters_of(kind: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases of a network, of one with three heads, of three networks."""
    torch.manual_seed(0)
    model: nn.Module
    if kind == "siren":
        model = sf.Siren(2, 64, 4, 1)
    elif kind == "strainer":
        model = sf.Strainer(2, 64, 4, 1, 3, 3)
    else:
        model = sf.BatchedSiren(3, 2, 64, 4, 1)
    parameters = [p.detach().cuda().requires_grad_() for p in model.parameters()]
    return parameters[::2], parameters[1::2]


def loss_of(kind: str, points: Tensor, values: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    """The one-pass loss and a penalty of somebody else's."""
    penalty = 0.1 * weights[1].square().sum()
    if kind == "siren":
        return siren_mse(points, values[0], weights, biases, implementation="triton") + penalty
    if kind == "strainer":
        return strainer_mse(points, values, weights, biases, implementation="triton")[0] + penalty
    return batched_siren_mse(points, values, weights, biases, implementation="triton").sum() + penalty


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["siren", "strainer", "stack"])
def test_one_pass_losses(kind: str, backend: str) -> None:
    weights, biases = parameters_of(kind)
    count = 1 if kind == "siren" else 3
    points, values = torch.rand(POINTS, 2, device="cuda") * 2 - 1, torch.rand(count, POINTS, 1, device="cuda")

    def loss(weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return loss_of(kind, points, values, weights, biases)

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    got, want = ([f(weights, biases), *torch.autograd.grad(f(weights, biases), [*weights, *biases])]
                 for f in (compiled, loss))  # fmt: skip
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)

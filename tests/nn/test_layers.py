"""Layers: initialisation, shapes, errors, and life in a stranger's training loop."""

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn

import strainer_fast as sf
from strainer_fast import ops


def assert_uniform(values: Tensor, bound: float) -> None:
    """Uniform on [-bound, bound], by range and by the Kolmogorov-Smirnov distance at 0.1 % significance."""
    flat = values.detach().flatten().double().sort().values
    assert flat.abs().max() <= bound
    n = len(flat)
    cdf = (flat / bound + 1) / 2
    steps = torch.arange(1, n + 1, dtype=torch.float64) / n
    assert (cdf - steps).abs().max() < 1.95 / math.sqrt(n)


@pytest.mark.parametrize("omega", [30.0, 7.0])
def test_initialisation(omega: float) -> None:
    first = sf.SineLinear(3, 4000, omega=omega, is_first=True)
    assert_uniform(first.weight, 1 / 3)
    assert_uniform(first.bias, 1 / math.sqrt(3))
    hidden = sf.SineLinear(64, 500, omega=omega)
    assert_uniform(hidden.weight, math.sqrt(6 / 64) / omega)
    assert_uniform(hidden.bias, 1 / 8)
    stacked = sf.BatchedSineLinear(5, 64, 100, omega=omega)
    assert_uniform(stacked.weight, math.sqrt(6 / 64) / omega)
    heads = sf.MultiHeadLinear(10, 64, 30, omega=omega)
    assert_uniform(heads.weight, math.sqrt(6 / 64) / omega)
    assert_uniform(heads.bias, 1 / 8)


def test_generator_makes_it_reproducible() -> None:
    a, b = sf.SineLinear(4, 5), sf.SineLinear(4, 5)
    assert not torch.equal(a.weight, b.weight)
    for layer in (a, b):
        layer.reset_parameters(torch.Generator().manual_seed(3))
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.bias, b.bias)


@pytest.mark.parametrize("shape", [(4,), (7, 4), (2, 7, 4), (0, 4)])
def test_sine_linear_keeps_leading_axes(shape: tuple[int, ...]) -> None:
    y = sf.SineLinear(4, 5)(torch.randn(shape))
    assert y.shape == (*shape[:-1], 5)
    assert (y.abs() <= 1).all()


@pytest.mark.parametrize("num_points", [0, 1, 9])
def test_stacked_layers_equal_a_loop(num_points: int) -> None:
    sine, heads = sf.BatchedSineLinear(3, 4, 6, omega=12.0), sf.MultiHeadLinear(3, 6, 2)
    x = torch.randn(num_points, 4)
    h = sine(x)
    y = heads(h)
    assert y.shape == (3, num_points, 2)
    for n in range(3):
        alone = torch.sin(12.0 * (x @ sine.weight[n].T + sine.bias[n]))
        torch.testing.assert_close(h[n], alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(y[n], alone @ heads.weight[n].T + heads.bias[n], atol=1e-5, rtol=0)
    torch.testing.assert_close(heads(h[0])[1], h[0] @ heads.weight[1].T + heads.bias[1])


def test_without_bias_there_is_no_bias() -> None:
    assert list(sf.SineLinear(2, 3, bias=False).state_dict()) == ["weight"]
    assert sf.MultiHeadLinear(2, 2, 3, bias=False)(torch.randn(4, 2)).shape == (2, 4, 3)


def test_strided_and_expanded_inputs() -> None:
    layer, x = sf.SineLinear(4, 5), torch.randn(4, 6)
    torch.testing.assert_close(layer(x.T), layer(x.T.contiguous()))
    torch.testing.assert_close(layer(x[:, :1].T.expand(3, 4)), layer(x[:, 0]).expand(3, 5))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: sf.SineLinear(0, 3), "in_features: expected an integer of at least 1, got 0"),
        (lambda: sf.SineLinear(2, 3.0), "out_features: expected an integer of at least 1, got float"),
        (lambda: sf.SineLinear(2, 3, omega=0.0), "omega: expected a finite number above 0, got 0.0"),
        (lambda: sf.SineLinear(2, 3, omega=math.nan), "omega"),
        (lambda: sf.BatchedSineLinear(0, 2, 3), "num_signals"),
        (lambda: sf.MultiHeadLinear(True, 2, 3), "num_heads"),
        (
            lambda: sf.SineLinear(2, 3)(torch.zeros(4, 3)),
            r"input of SineLinear: expected shape \[..., 2\], got \[4, 3\]",
        ),
        (lambda: sf.MultiHeadLinear(2, 2, 3)(torch.zeros(3, 4, 2)), r"\[P, 2\] or \[2, P, 2\], got \[3, 4, 2\]"),
        (lambda: sf.BatchedSineLinear(2, 2, 3)(torch.zeros(2)), "input of BatchedSineLinear"),
        (
            lambda: sf.SineLinear(2, 3, implementation="native"),
            "implementation: expected one of 'auto', 'triton', 'torch'",
        ),
        (lambda: sf.MultiHeadLinear(2, 2, 3, precision="half"), "precision: expected one of 'fp32'"),
    ],
)
def test_bad_arguments_say_what_to_do(build: object, message: str) -> None:
    with pytest.raises(sf.InputError, match=message):
        build()


class Strangers(nn.Module):
    """Somebody else's network around our layers."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(sf.SineLinear(2, 32, is_first=True), sf.SineLinear(32, 32))
        self.gate = nn.Linear(32, 32)
        self.heads = sf.MultiHeadLinear(2, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.trunk(x)
        return self.heads(h * torch.sigmoid(self.gate(h)))


@pytest.fixture
def task() -> tuple[Strangers, Tensor, Tensor]:
    x = sf.signals.grid((8, 8))
    return Strangers(), x, torch.stack([x[:, :1] * x[:, 1:], x[:, :1]])


def train(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, steps: int) -> tuple[float, float]:
    losses = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        losses.append(loss.item())
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return losses[0], losses[-1]


@pytest.mark.parametrize(("name", "lr", "steps"), [("Adam", 1e-3, 30), ("SGD", 0.05, 100), ("LBFGS", 0.1, 30)])
def test_any_optimiser_trains_them(name: str, lr: float, steps: int, task: tuple[Strangers, Tensor, Tensor]) -> None:
    model, x, y = task
    first, last = train(model, x, y, getattr(torch.optim, name)(model.parameters(), lr=lr), steps)
    assert last < 0.5 * first


def test_copies_and_saved_states_compute_the_same(task: tuple[Strangers, Tensor, Tensor]) -> None:
    model, x, _ = task
    expected = model(x)
    other = Strangers()
    other.load_state_dict(model.state_dict())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), other, torch.nn.Sequential(model)):
        assert torch.equal(twin(x), expected)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        next(twin.parameters()).add_(1)
    assert torch.equal(model(x), expected)


def test_autocast_leaves_the_sine_alone(task: tuple[Strangers, Tensor, Tensor]) -> None:
    model, x, y = task
    layer = model.trunk[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), layer(x))
        assert layer(x).dtype == torch.float32
        assert model(x).dtype == torch.bfloat16  # the linear heads follow autocast, as nn.Linear does
        inside = layer(x)
        loss = nn.functional.mse_loss(model(x).float(), y)
    loss.backward()
    assert torch.equal(inside, layer(x))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_second_derivatives_train_a_laplacian_loss() -> None:
    model = nn.Sequential(sf.SineLinear(2, 16, omega=5.0, is_first=True), nn.Linear(16, 1)).double()
    x = sf.signals.grid((4, 4), dtype=torch.float64).requires_grad_()

    def laplacian() -> Tensor:
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        parts = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
        return torch.stack(parts).sum(0)

    layer, linear = model[0], model[1]
    z = 5.0 * (x @ layer.weight.T + layer.bias)
    closed_form = -(torch.sin(z) * 25.0 * layer.weight.square().sum(1)) @ linear.weight.T
    torch.testing.assert_close(laplacian(), closed_form[:, 0])
    loss = laplacian().square().mean()
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in [layer.weight, layer.bias, linear.weight])


def test_functional_transforms() -> None:
    layer, x = sf.SineLinear(2, 3), torch.randn(5, 2)
    jacobian = torch.func.vmap(torch.func.jacrev(layer))(x)
    expected = 30.0 * torch.cos(30.0 * (x @ layer.weight.T + layer.bias))[..., None] * layer.weight
    torch.testing.assert_close(jacobian, expected, atol=1e-4, rtol=1e-4)


def test_frozen_layers_get_no_gradient() -> None:
    layer = sf.SineLinear(2, 3).requires_grad_(False)
    head = nn.Linear(3, 1)
    head(layer(torch.randn(4, 2))).sum().backward()
    assert layer.weight.grad is None
    assert head.weight.grad is not None


def test_dtype_and_meta_device() -> None:
    assert sf.SineLinear(2, 3, dtype=torch.float64)(torch.zeros(1, 2, dtype=torch.float64)).dtype == torch.float64
    assert sf.SineLinear(2, 3, device="meta").weight.is_meta
    assert sf.SineLinear(2, 3).half()(torch.zeros(1, 2).half()).dtype == torch.float16


def test_implementation_and_precision_are_of_the_module_not_of_its_state() -> None:
    layer = sf.SineLinear(2, 3, implementation="torch", precision="tf32")
    assert list(layer.state_dict()) == ["weight", "bias"]
    twin = pickle.loads(pickle.dumps(layer))
    assert (twin.implementation, twin.precision) == ("torch", "tf32")
    del layer.implementation, layer.precision  # as pickled by a version that had neither
    assert (layer.implementation, layer.precision) == ("auto", "fp32")
    assert torch.equal(layer(torch.ones(1, 2)), twin(torch.ones(1, 2)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_triton_by_name_is_not_replaced_silently() -> None:
    layer = sf.BatchedSineLinear(2, 2, 3, implementation="triton").double()
    with pytest.raises(sf.InputError, match="'triton' where it can run"):
        layer(torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("name", ["sine_linear", "batched_sine_linear", "multi_head_linear"])
@pytest.mark.parametrize("shared", [True, False])
def test_any_order_of_derivatives_in_float64(name: str, shared: bool) -> None:
    """The public functions on their way to plain PyTorch; the Triton path: tests/ops_triton."""
    stack = () if name == "sine_linear" else (2,)
    shapes = [(*(() if shared else stack), 4, 3), (*stack, 2, 3), (*stack, 2)]
    arguments = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    if name != "multi_head_linear":
        arguments.append(torch.tensor(2.0, dtype=torch.float64, requires_grad=True))  # omega
    assert torch.autograd.gradcheck(getattr(ops, name), arguments)
    assert torch.autograd.gradgradcheck(getattr(ops, name), arguments)


def test_repr_says_what_matters() -> None:
    assert repr(sf.SineLinear(2, 3, omega=5.0)) == "SineLinear(2, 3, bias=True, omega=5, is_first=False)"
    assert repr(sf.MultiHeadLinear(4, 2, 3)) == "MultiHeadLinear(4, 2, 3, bias=True)"
    chosen = sf.SineLinear(2, 3, omega=5.0, implementation="torch", precision="tf32")
    assert repr(chosen).endswith("is_first=False, implementation=torch, precision=tf32)")

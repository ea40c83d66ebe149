"""The layers' Triton path against float64: values, gradients of every order, and nothing computed that nobody needs."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import strainer_fast as sf
from strainer_fast import ops
from strainer_fast.kernels import layers as launchers
from strainer_fast.kernels.mm import PRECISIONS
from strainer_fast.ops import layers
from tests.kernels.guards import UNIT

OMEGA = 10.0


def run(
    name: str, x: Tensor, weight: Tensor, bias: Tensor | None, implementation: str = "triton", **more: str
) -> Tensor:
    """One of the three functions, on networks [N, out, in] or (sine_linear) the first of them."""
    function = getattr(ops, name)
    if name == "multi_head_linear":
        return function(x, weight, bias, implementation=implementation, **more)
    return function(x, weight, bias, OMEGA, implementation=implementation, **more)


def problem(name: str, points: int, inputs: int, outputs: int, shared: bool, bias: bool = True) -> list[Tensor | None]:
    """x, weight, bias with arguments of the sine as SIREN's rules make them."""
    stack = () if name == "sine_linear" else (2,)
    x = torch.rand(*(() if shared else stack), points, inputs) * 2 - 1
    weight = (torch.rand(*stack, outputs, inputs) * 2 - 1) * math.sqrt(6 / inputs) / OMEGA
    return [x, weight, torch.rand(*stack, outputs) if bias else None]


def derivatives(function: Callable[..., Tensor], arguments: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
    """The value, all first derivatives of a random sum of it, and all derivatives of a random sum of their squares."""
    generator = torch.Generator().manual_seed(1)

    def mixed(tensors: list[Tensor]) -> Tensor:
        return sum((t * torch.rand(t.shape, generator=generator, device="cpu").to(t)).sum() for t in tensors)

    arguments = [None if t is None else t.detach().to(dtype).requires_grad_() for t in arguments]
    there = [t for t in arguments if t is not None]
    y = function(*arguments)
    first = list(torch.autograd.grad(mixed([y]), there, create_graph=True))
    # The value joins them: a linear layer's derivatives know nothing of its bias.
    second = torch.autograd.grad(mixed([g.square() for g in (y, *first)]), there)
    return [y.detach(), *(g.detach() for g in first), *second]


def assert_near(ours: list[Tensor], exact: list[Tensor], limit: float) -> None:
    for got, want in zip(ours, exact, strict=True):
        assert got.shape == want.shape
        assert float((got.double() - want).norm()) <= limit * float(want.norm()) + 1e-12


CASES = [
    ("sine_linear", 7, 1, 1, True, True),
    ("sine_linear", 40, 3, 33, True, True),
    ("sine_linear", 100, 33, 100, True, False),
    ("batched_sine_linear", 20, 2, 33, True, True),
    ("batched_sine_linear", 20, 100, 3, False, True),
    ("batched_sine_linear", 1, 33, 1, True, False),
    ("multi_head_linear", 20, 33, 3, True, True),
    ("multi_head_linear", 20, 3, 1, False, False),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_orders_of_derivatives(case: tuple[str, int, int, int, bool, bool]) -> None:
    name, *sizes = case
    arguments = problem(name, *sizes)
    ours = derivatives(lambda *a: run(name, *a), arguments, torch.float32)
    exact = derivatives(lambda *a: run(name, *a, "torch"), arguments, torch.float64)
    assert_near(ours, exact, 2e-5)


@pytest.mark.parametrize("name", ["sine_linear", "batched_sine_linear", "multi_head_linear"])
def test_no_points(name: str) -> None:
    x, weight, bias = problem(name, 0, 3, 5, True)
    ours = derivatives(lambda *a: run(name, *a), [x, weight, bias], torch.float32)
    assert ours[0].numel() == 0
    assert all(not t.any() for t in ours[1:])  # zeros, not NaN


@pytest.mark.parametrize("inputs", [3, 20])
def test_strides_and_leading_axes(inputs: int) -> None:
    x = torch.rand(3, 5, inputs + 1)[1:, :, 1:]  # misaligned
    weight = torch.rand(inputs, 6).T / 10
    bias = torch.rand(12)[::2]
    for points in (x, x.transpose(0, 1), x[:, :1].expand(2, 4, inputs), x[0, 0])[: 4 if inputs == 3 else 2]:
        assert_near(
            derivatives(lambda *a: run("sine_linear", *a), [points, weight, bias], torch.float32),
            derivatives(lambda *a: run("sine_linear", *a, "torch"), [points, weight, bias], torch.float64),
            2e-5,
        )
    # Strides that .to() would tidy up, and a gradient that is expanded from one number.
    weight.requires_grad_()
    y = ops.multi_head_linear(x[0].T[:inputs].T, weight.expand(2, 6, inputs), implementation="triton")
    y.sum().backward()
    torch.testing.assert_close(weight.grad, 2 * x[0].sum(0).expand(6, inputs))
    # One output: PyTorch calls a gradient contiguous whatever the stride of its last axis.
    weight = torch.rand(1, 1, inputs, requires_grad=True)
    y = ops.multi_head_linear(x[0], weight, implementation="triton")
    dy = torch.rand(1, 5).T.unsqueeze(0)
    y.backward(dy)
    torch.testing.assert_close(weight.grad, (dy.mT @ x[0]))


def test_omega_has_a_gradient() -> None:
    x, weight, bias = problem("sine_linear", 20, 4, 6, True)
    omega = torch.tensor(OMEGA)

    def function(implementation: str) -> Callable[..., Tensor]:
        return lambda x, w, b, o: ops.sine_linear(x, w, b, o, implementation=implementation)

    ours = derivatives(function("triton"), [x, weight, bias, omega], torch.float32)
    assert_near(ours, derivatives(function("torch"), [x, weight, bias, omega], torch.float64), 5e-5)
    omega.requires_grad_()
    ops.sine_linear(x, weight, bias, omega, implementation="triton").sum().backward()
    z = OMEGA * (x @ weight.T + bias)
    torch.testing.assert_close(omega.grad, (z.cos() * z).sum() / OMEGA, rtol=1e-4, atol=1e-4)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels launched."""
    names: list[str] = []

    def spy(name: str) -> Callable[..., None]:
        launch = getattr(launchers, name)

        def spied(*args: object, **more: object) -> None:
            names.append(name.removeprefix("launch_"))
            launch(*args, **more)

        return spied

    for name in ("launch_forward", "launch_slope", "launch_input_gradient", "launch_weight_gradient"):
        monkeypatch.setattr(launchers, name, spy(name))
    return names


@pytest.mark.parametrize(
    ("wanted", "backward", "saved"),
    [
        ("xwb", ["slope", "input_gradient", "weight_gradient"], 3),  # x, W, z
        ("wb", ["slope", "weight_gradient"], 2),
        ("x", ["slope", "input_gradient"], 2),
        ("b", ["slope"], 1),
        ("", [], 0),
    ],
)
def test_only_what_is_needed_is_computed_and_kept(
    wanted: str, backward: list[str], saved: int, launched: list[str]
) -> None:
    x, weight, bias = problem("batched_sine_linear", 9, 4, 5, False)
    for letter, tensor in zip("xwb", (x, weight, bias), strict=True):
        tensor.requires_grad_(letter in wanted)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = run("batched_sine_linear", x, weight, bias)
    assert len(packed) == saved
    if wanted:
        y.sum().backward()
    assert launched == ["forward", *backward]
    assert [t.grad is not None for t in (x, weight, bias)] == [letter in wanted for letter in "xwb"]


def test_same_bits_every_time_where_the_points_are_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "splits_for", lambda *sizes: 3)
    arguments = problem("sine_linear", 2500, 4, 5, True)  # the interpreter's tiles hold 1024 points
    twice = [derivatives(lambda *a: run("sine_linear", *a), arguments, torch.float32) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*twice, strict=True))
    assert_near(twice[0], derivatives(lambda *a: run("sine_linear", *a, "torch"), arguments, torch.float64), 2e-5)


@pytest.mark.parametrize("precision", PRECISIONS[1:])
def test_a_precision_rounds_forward_and_backward(precision: str) -> None:
    arguments = problem("batched_sine_linear", 60, 40, 40, False)
    exact = derivatives(lambda *a: run("batched_sine_linear", *a, "torch"), arguments, torch.float64)
    ours = derivatives(lambda *a: run("batched_sine_linear", *a, precision=precision), arguments, torch.float32)
    unit = UNIT[precision]
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(ours[:4], exact[:4], strict=True)]
    assert all(unit / 30 < error < 8 * unit for error in errors[:3]), errors
    assert errors[3] < 8 * unit  # the bias's gradient is a sum, not a product
    coarse = run("batched_sine_linear", *arguments, "torch", precision=precision)
    torch.testing.assert_close(coarse.double(), exact[0], atol=1e-5, rtol=0)  # plain PyTorch rounds nothing


def test_the_precisions_are_those_of_the_kernels() -> None:
    assert layers.PRECISIONS == PRECISIONS


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs(dtype: torch.dtype) -> None:
    x, weight, bias = problem("batched_sine_linear", 20, 8, 6, True)
    for mixed in ([x.to(dtype), weight.to(dtype), bias.to(dtype)], [x.to(dtype), weight, bias]):
        ours, theirs = (run("batched_sine_linear", *mixed, i) for i in ("triton", "torch"))
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, atol=1e-6 if ours.dtype == torch.float32 else 8e-3, rtol=0)
    halves = [t.to(dtype).requires_grad_() for t in (x, weight, bias)]
    y = run("multi_head_linear", *halves)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    doubles = [t.detach().double().requires_grad_() for t in halves]
    run("multi_head_linear", *doubles, "torch").square().sum().backward()
    for half, double in zip(halves, doubles, strict=True):
        assert half.grad.dtype == dtype
        assert float((half.grad - double.grad).norm()) < 4 * torch.finfo(dtype).eps * float(double.grad.norm())


def network(implementation: str, dtype: torch.dtype = torch.float32, heads: bool = False) -> nn.Sequential:
    """The same parameters whatever runs them; the last layer is one head, [P, 2] -> [1, P, 1] or [P, 1]."""
    torch.manual_seed(0)
    how = {"omega": 5.0, "implementation": implementation}
    last = sf.MultiHeadLinear(1, 8, 1, **how) if heads else nn.Linear(8, 1)
    return nn.Sequential(sf.SineLinear(2, 8, is_first=True, **how), sf.SineLinear(8, 8, **how), last).to(dtype)


def test_autocast_leaves_the_sine_alone_and_reaches_the_heads() -> None:
    x = sf.signals.grid((6, 6))
    ours, theirs = (network(i, heads=True) for i in ("triton", "torch"))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        assert ours[0](x).dtype == torch.float32
        torch.testing.assert_close(ours[0](x), theirs[0](x), atol=1e-6, rtol=0)
        y, reference = ours(x), theirs(x)
        assert y.dtype == reference.dtype == torch.bfloat16
        torch.testing.assert_close(y, reference, atol=0.01, rtol=0.01)
    y.float().square().mean().backward()
    reference.float().square().mean().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert a.grad.dtype == torch.float32
        assert float((a.grad - b.grad).norm()) < 0.03 * float(b.grad.norm())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy, which interprets, on inf - inf
def test_a_scaled_loss_scales_gradients_and_overflow_is_seen() -> None:
    x, model = sf.signals.grid((5, 5)), network("triton")

    def gradients(scale: float) -> list[Tensor]:
        return list(torch.autograd.grad(model(x).square().mean() * scale, list(model.parameters())))

    for scaled, plain in zip(gradients(1024.0), gradients(1.0), strict=True):
        torch.testing.assert_close(scaled, 1024 * plain, rtol=1e-6, atol=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(x.device.type, init_scale=1e38)
    before = [p.detach().clone() for p in model.parameters()]
    scaler.scale(1e3 * model(x).square().mean()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert scaler.get_scale() < 6e37


def eikonal(model: nn.Module, x: Tensor) -> Tensor:
    """(|grad f| - 1)^2, of signed distances."""
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return (slope.norm(dim=-1) - 1).square().mean()


def laplacian(model: nn.Module, x: Tensor) -> Tensor:
    """(lap f - 1)^2, as for Poisson's equation."""
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    parts = [torch.autograd.grad(slope[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(2)]
    return (sum(parts) - 1).square().mean()


@pytest.mark.parametrize("loss", [eikonal, laplacian])
def test_losses_on_derivatives_train(loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
    ours, exact = network("triton"), network("torch").double()
    x = sf.signals.grid((5, 5)).requires_grad_()
    got = torch.autograd.grad(loss(ours, x), list(ours.parameters())[:-1])
    want = torch.autograd.grad(loss(exact, x.detach().double().requires_grad_()), list(exact.parameters())[:-1])
    assert_near(list(got), list(want), 1e-4)
    optimizer = torch.optim.Adam(ours.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        value = loss(ours, x)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(4, 2)}, r"x of batched_sine_linear: expected shape \[P, 3\] or \[2, P, 3\], got \[4, 2\]"),
        ({"x": torch.zeros(3, 4, 3)}, r"\[2, P, 3\], got \[3, 4, 3\]"),
        ({"weight": torch.zeros(5, 3)}, "weight of batched_sine_linear"),
        ({"bias": torch.zeros(5)}, r"bias of batched_sine_linear: expected shape \[2, 5\], got \[5\]"),
        ({"bias": torch.zeros(2, 5, device="meta")}, "one device"),
        ({"omega": torch.ones(2)}, "omega: expected a number or a tensor of one element"),
        ({"omega": math.nan}, "omega"),
        ({"precision": "fp8"}, "precision: expected one of 'fp32'"),
        ({"implementation": "native"}, "'native' and 'tiled' are for whole training steps"),
        ({"weight": torch.zeros(2, 5, 3, dtype=torch.float64)}, "'triton' where it can run, got .*float64"),
        ({"x": torch.zeros(4, 3, dtype=torch.complex64)}, "'triton' with floats"),
    ],
)
def test_bad_arguments_say_what_to_do(change: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(4, 3), "weight": torch.zeros(2, 5, 3), "implementation": "triton", **change}
    with pytest.raises(sf.InputError, match=message):
        ops.batched_sine_linear(**arguments)


def test_heads_take_one_dtype() -> None:
    with pytest.raises(sf.InputError, match="one dtype for x, weight and bias"):
        ops.multi_head_linear(torch.zeros(4, 3), torch.zeros(2, 5, 3).half(), implementation="triton")

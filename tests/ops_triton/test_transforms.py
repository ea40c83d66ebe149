"""The layers' Triton path under torch.func, forward mode, torch.compile and opcheck."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func, nn
from torch.autograd import forward_ad

import strainer_fast as sf
from strainer_fast import ops
from strainer_fast.ops import layer_ops

# PyTorch's forward mode compiles its decompositions with its deprecated compiler on first use.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

OMEGA = 3.0
Layer = Callable[..., Tensor]


def sine(implementation: str) -> Layer:
    return lambda x, w, b: ops.sine_linear(x, w, b, OMEGA, implementation=implementation)


def batched(implementation: str) -> Layer:
    return lambda x, w, b: ops.batched_sine_linear(x, w, b, OMEGA, implementation=implementation)


def heads(implementation: str) -> Layer:
    return lambda x, w, b: ops.multi_head_linear(x, w, b, implementation=implementation)


def assert_same(transform: Callable[[Layer], object], layer: Callable[[str], Layer]) -> None:
    """A transform of the Triton path and of plain PyTorch."""
    torch.testing.assert_close(transform(layer("triton")), transform(layer("torch")), atol=2e-5, rtol=1e-4)


B, P, IN, OUT = 3, 4, 3, 5
"""Of a batch, points, inputs and outputs."""

X, W, BIAS = (B, P, IN), (B, OUT, IN), (B, OUT)


@pytest.mark.parametrize("which", ["x", "w", "b", "wb", "xwb"])
@pytest.mark.parametrize("axis", [0, -1])
def test_vmap_of_a_layer(which: str, axis: int) -> None:
    batches = {"x": torch.randn(X), "w": torch.randn(W), "b": torch.randn(BIAS)}
    dims = tuple(axis if name in which else None for name in batches)
    arguments = [t.movedim(0, d) if d is not None else t[0] for t, d in zip(batches.values(), dims, strict=True)]
    assert_same(lambda f: func.vmap(f, in_dims=dims)(*arguments), sine)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("which", ["x", "wb", "xwb"])
@pytest.mark.parametrize("layer", [batched, heads])
def test_vmap_of_stacked_layers(layer: Callable[[str], Layer], which: str, shared: bool) -> None:
    """Gradients of every argument with it: all operations of the backward pass are mapped too."""
    num = 2
    batches = {
        "x": torch.randn(B, *(() if shared else (num,)), P, IN),
        "w": torch.randn(B, num, OUT, IN),
        "b": torch.randn(B, num, OUT),
    }
    dims = tuple(0 if name in which else None for name in batches)
    arguments = [t if d == 0 else t[0] for t, d in zip(batches.values(), dims, strict=True)]

    def loss(f: Layer) -> Callable[..., Tensor]:
        return lambda x, w, b: f(x, w, b).square().sum()

    assert_same(lambda f: func.vmap(func.grad(loss(f), (0, 1, 2)), in_dims=dims)(*arguments), layer)


def test_a_gradient_through_vmap() -> None:
    x, w, b = torch.randn(P, IN), torch.randn(W), torch.randn(BIAS)

    def ensemble(f: Layer) -> Callable[[Tensor], Tensor]:
        return lambda w: func.vmap(f, in_dims=(None, 0, 0))(x, w, b).square().sum()

    assert_same(lambda f: func.grad(ensemble(f))(w), sine)


def test_jacobian_of_a_point_and_its_module() -> None:
    layer, x = sf.SineLinear(2, 3, omega=OMEGA, implementation="triton"), torch.randn(5, 2)
    expected = OMEGA * torch.cos(OMEGA * (x @ layer.weight.T + layer.bias))[..., None] * layer.weight
    torch.testing.assert_close(func.vmap(func.jacrev(layer))(x), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(func.vmap(func.jacfwd(layer))(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layer", [sine, heads])
def test_forward_mode(layer: Callable[[str], Layer]) -> None:
    stack = () if layer is sine else (2,)
    primals = (torch.randn(P, IN), torch.randn(*stack, OUT, IN), torch.randn(*stack, OUT))
    tangents = tuple(torch.randn_like(p) for p in primals)
    assert_same(lambda f: func.jvp(f, primals, tangents), layer)
    with forward_ad.dual_level():
        duals = [*primals[:2], forward_ad.make_dual(primals[2], tangents[2])]  # only the bias has a tangent
        results = [forward_ad.unpack_dual(layer(i)(*duals)) for i in ("triton", "torch")]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_forward_over_reverse_of_a_batch(argument: int) -> None:
    """Hessian-vector products of stacked networks: forward mode through every operation of the backward pass."""
    primals = [torch.randn(P, IN), torch.randn(2, OUT, IN), torch.randn(2, OUT)]
    tangents = tuple(torch.randn_like(p) for p in primals)

    def slope(f: Layer) -> Callable[..., object]:
        return func.grad(lambda *a: f(*a).square().sum(), argument)

    assert_same(lambda f: func.jvp(slope(f), tuple(primals), tangents), batched)


def test_hessians_of_points() -> None:
    x, w, b = torch.randn(P, 2), torch.randn(OUT, 2), torch.randn(OUT)
    assert_same(lambda f: func.vmap(func.hessian(lambda v: f(v, w, b).sum()))(x), sine)
    assert_same(lambda f: func.vmap(func.jacrev(func.jacrev(lambda v: f(v, w, b).sum())))(x), sine)


def needs_gradient(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


N = 2


@pytest.mark.parametrize(("shared", "bias"), [(True, True), (False, False)])
@pytest.mark.filterwarnings("ignore")  # PyTorch's own checks warn about themselves
def test_opcheck(shared: bool, bias: bool) -> None:
    groups = 1 if shared else N
    x, w, b = needs_gradient(groups, P, IN), needs_gradient(N, OUT, IN), needs_gradient(N, OUT) if bias else None
    dz = needs_gradient(N, P, OUT)
    torch.library.opcheck(layer_ops.linear_op, (x, w, b, "fp32"))
    torch.library.opcheck(layer_ops.sine_op, (x, w, b, OMEGA, bias, "fp32"))
    torch.library.opcheck(layer_ops.weight_gradient_op, (dz, x, bias, "fp32"))
    torch.library.opcheck(layer_ops.input_gradient_op, (dz, w, groups, "fp32"))
    if bias:  # nothing of the slope depends on the case
        torch.library.opcheck(layer_ops.slope_op, (dz, needs_gradient(N, P, OUT), OMEGA, "fp32"))


def network(implementation: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        sf.SineLinear(2, 8, is_first=True, implementation=implementation),
        sf.SineLinear(8, 8, bias=False, implementation=implementation, precision="bf16"),
        sf.BatchedSineLinear(2, 8, 8, implementation=implementation),
        sf.MultiHeadLinear(2, 8, 1, implementation=implementation),
    )


@pytest.mark.parametrize("implementation", ["triton", "auto"])
@pytest.mark.filterwarnings("ignore")  # the compiler warns about itself
def test_compiled_without_a_graph_break(implementation: str) -> None:
    model, x = network(implementation), torch.randn(9, 2, requires_grad=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def outcome(f: nn.Module) -> list[Tensor]:
        y = f(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]

    torch.testing.assert_close(outcome(compiled), outcome(model), atol=1e-6, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x[:4]), model(x[:4]))


@pytest.mark.filterwarnings("ignore")
def test_compiled_for_any_number_of_points_and_any_omega() -> None:
    weight = torch.randn(OUT, IN, requires_grad=True)

    def layer(x: Tensor, omega: float) -> Tensor:
        return ops.sine_linear(x, weight, None, omega, implementation="triton")

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for points, omega in ((3, 3.0), (7, 4.0), (0, 5.0)):  # from the second on sizes and numbers are symbols
        x = torch.randn(points, IN)
        outcomes = [(y, *torch.autograd.grad(y.sum(), weight)) for y in (compiled(x, omega), layer(x, omega))]
        torch.testing.assert_close(*outcomes)


@pytest.mark.filterwarnings("ignore")
def test_compiled_forward_mode_is_refused_or_right() -> None:
    """The compiler's node has no forward mode; without care its derivative would be zero."""
    x, w, b = torch.randn(P, IN), torch.randn(OUT, IN), torch.randn(OUT)

    def derivative(implementation: str) -> Callable[[Tensor], Tensor]:
        return lambda x: func.jvp(lambda x: sine(implementation)(x, w, b), (x,), (x,))[1]

    def compiled(implementation: str) -> Tensor:
        return torch.compile(derivative(implementation), backend="aot_eager", fullgraph=True)(x)

    with pytest.raises(Exception, match=r"Observed exception|where forward mode or torch.func is compiled"):
        compiled("triton")
    torch.testing.assert_close(compiled("auto"), derivative("torch")(x))


FAKE = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from strainer_fast.ops import layer_ops as o

with FakeTensorMode():
    new = lambda *shape: torch.empty(shape, device="cuda")
    for groups, n, p, i, out in ((1, 1, 7, 3, 5), (1, 4, 0, 8, 1), (4, 4, 9, 2, 6)):
        x, w, b, dz = new(groups, p, i), new(n, out, i), new(n, out), new(n, p, out)
        for found, shapes in (
            ([o.linear_op(x, w, b, "fp32")], [(n, p, out)]),
            ([o.linear_op(x.half(), w.half(), None, "fp16").float()], [(n, p, out)]),
            (o.sine_op(x, w, b, 30.0, True, "tf32"), [(n, p, out)] * 2),
            (o.sine_op(x, w, None, 30.0, False, "fp32"), [(n, p, out), (0,)]),
            ([o.slope_op(dz, dz.clone(), 30.0, "fp32")], [(n, p, out)]),
            ([o.input_gradient_op(dz, w, groups, "bf16")], [(groups, p, i)]),
            (o.weight_gradient_op(dz, x, True, "fp32"), [(n, out, i), (n, out)]),
            (o.weight_gradient_op(dz, x, False, "fp32"), [(n, out, i), (0,)]),
        ):
            assert [tuple(t.shape) for t in found] == shapes, (found, shapes)
            assert all(t.dtype == torch.float32 and t.device.type == "cuda" for t in found)
    assert o.weight_gradient_op(dz.half(), x.half(), True, "fp16")[0].dtype == torch.float16
print("fine")
"""


def test_shapes_on_a_gpu_that_is_not_there() -> None:
    """In a process of its own: on a build without CUDA a fake CUDA tensor is a risk for what comes after it."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FAKE], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr

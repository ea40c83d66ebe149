"""The one-pass losses on the Triton kernels: gradients against float64, every way a step can be put together."""

from typing import Any

import pytest
import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.fitting.rendering import quantised
from strainer_fast.kernels import configs
from strainer_fast.kernels import siren as pipeline
from strainer_fast.kernels.tiles import Row, Tiles
from strainer_fast.ops import batched_siren_mse, siren_mse, siren_values, strainer_mse
from strainer_fast.ops.dispatch import PRECISIONS
from strainer_fast.ops.one_pass import _sweep
from tests.kernels.guards import UNIT, relative


def network(
    num_layers: int, width: int, inputs: int, channels: int, num_signals: int, num_shared: int | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Weights and biases by SIREN's rules; layers from `num_shared` on are stacked (None: a plain network)."""
    weights, biases = [], []
    for i in range(num_layers):
        stack = () if num_shared is None or i < num_shared else (num_signals,)
        shape = (channels if i == num_layers - 1 else width, inputs if i == 0 else width)
        weight, bias = torch.empty(*stack, *shape), torch.empty(*stack, shape[0])
        sf.nn.init.init_linear_(weight, bias, 30.0, is_first=i == 0)
        weights.append(weight.requires_grad_())
        biases.append(bias.requires_grad_())
    return weights, biases


def data(num_points: int, inputs: int = 2, num_signals: int = 1, channels: int = 1) -> tuple[Tensor, Tensor]:
    return torch.rand(num_points, inputs) * 2 - 1, torch.rand(num_signals, num_points, channels)


def truth(
    points: Tensor,
    values: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    dtype: torch.dtype,
    omega: object = 30.0,
) -> list[Tensor]:
    """[losses, gradients of weights, biases and points of their sum] by autograd in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (*weights, *biases, points)]
    count = len(weights)
    prediction = reference.siren(leaves[-1], leaves[:count], leaves[count:-1], omega)
    losses = reference.mse(prediction if prediction.ndim == 3 else prediction.unsqueeze(0), values.to(dtype))
    return [losses.detach(), *torch.autograd.grad(losses.sum(), leaves)]


def ours(
    points: Tensor, values: Tensor, weights: list[Tensor], biases: list[Tensor], omega: object = 30.0,
    want_points: bool = False, **options: object,
) -> list[Tensor]:  # fmt: skip
    points = points.clone().requires_grad_(want_points)
    total, losses = strainer_mse(points, values, weights, biases, omega, implementation="triton", **options)
    wanted = [*weights, *biases, *([points] if want_points else [])]
    return [losses, *torch.autograd.grad(total, wanted)]


# layers, width, inputs, channels, signals, shared layers, points
CASES = {
    "plain": (4, 32, 2, 1, 1, None, 300),
    "wide": (3, 256, 2, 3, 1, None, 257),
    "width_1": (3, 1, 2, 1, 1, None, 40),
    "width_33": (4, 33, 2, 2, 1, None, 255),
    "width_100": (3, 100, 2, 1, 1, None, 60),
    "width_178": (3, 178, 2, 1, 1, None, 20),
    "width_512": (3, 512, 2, 1, 1, None, 20),
    "heads": (4, 20, 2, 1, 3, 3, 100),
    "many_heads": (3, 16, 2, 1, 40, 2, 64),
    "deep_decoders": (5, 20, 2, 2, 3, 2, 100),
    "one_shared_layer": (4, 20, 2, 1, 3, 1, 100),
    "one_shared_layer_then_heads": (3, 20, 2, 1, 3, 1, 100),
    "independent": (4, 20, 2, 3, 4, 0, 100),
    "independent_too_wide_for_chip": (3, 160, 2, 1, 2, 0, 40),
    "one_sine_layer": (2, 33, 2, 1, 2, 1, 50),
    "no_sine_layer": (1, 8, 2, 3, 2, 0, 50),
    "one_input": (3, 16, 1, 1, 1, None, 17),
    "three_inputs": (3, 16, 3, 1, 1, None, 50),
    "five_inputs": (3, 16, 5, 1, 1, None, 50),
    "one_point": (3, 16, 2, 1, 2, 2, 1),
}


@pytest.mark.parametrize("want_points", [False, True], ids=["weights", "points_too"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_gradients(case: tuple[int, ...], want_points: bool) -> None:
    layers, width, inputs, channels, signals, shared, points = case
    parameters, given = (
        network(layers, width, inputs, channels, signals, shared),
        data(points, inputs, signals, channels),
    )
    got = ours(*given, *parameters, want_points=want_points)
    exact, single = (truth(*given, *parameters, dtype) for dtype in (torch.float64, torch.float32))
    for g, e, s in zip(got, exact, single, strict=False):
        # As exact as autograd in float32: at most twice its error, or 1e-5.
        assert relative(g, e) <= max(1e-5, 2 * relative(s, e))


@pytest.mark.parametrize("kind", ["independent", "heads", "wide"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision: str, kind: str) -> None:
    case = {"independent": (4, 32, 2, 3, 2, 0), "heads": (4, 32, 2, 3, 4, 3), "wide": (4, 160, 2, 1, 1, None)}[kind]
    parameters, given = network(*case), data(120, 2, case[4], case[3])
    exact = truth(*given, *parameters, torch.float64)
    for g, e in zip(ours(*given, *parameters, precision=precision), exact, strict=False):
        # A few layers deep, each of which rounds its operands once.
        assert relative(g, e) <= 16 * UNIT[precision] + 1e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_is_no_worse_than_pytorchs(precision: str) -> None:
    parameters, given = network(5, 64, 2, 3, 1, None), data(200, 2, 1, 3)
    exact = truth(*given, *parameters, torch.float64)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    leaves = [p.detach().clone().requires_grad_() for p in (*parameters[0], *parameters[1])]
    # What autocast makes of it: products in half precision; here the sine's argument too, as with nn.Linear.
    h = given[0]
    for i in range(5):
        z = torch.nn.functional.linear(h.to(dtype), leaves[i].to(dtype), leaves[5 + i].to(dtype))
        h = torch.sin(30.0 * z) if i < 4 else z
    loss = (h.float() - given[1][0]).square().mean() * 512  # the usual loss scale
    peer = [g / 512 for g in torch.autograd.grad(loss, leaves)]
    for g, p, e in zip(ours(*given, *parameters, precision=precision)[1:], peer, exact[1:], strict=False):
        assert relative(g, e) <= relative(p, e)


def test_gradients_as_small_as_of_a_large_image_survive_fp16() -> None:
    parameters, (points, values) = network(3, 32, 2, 1, 1, None), data(100)
    # Point weights make residuals count as those of an image of 100 million points would.
    weights = torch.full((100,), 1e-6)
    total, _ = strainer_mse(
        points, values, *parameters, point_weights=weights, implementation="triton", precision="fp16"
    )
    got = torch.autograd.grad(total, parameters[0])
    for g, e in zip(got, truth(points, values, *parameters, torch.float64)[1:], strict=False):
        assert relative(g, e) <= 16 * UNIT["fp16"]


@pytest.mark.parametrize("change", ["signal_weights", "values", "mask"])
@pytest.mark.parametrize("size", [1e-8, 1e5])
def test_half_precision_at_any_size_of_values_and_weights(change: str, size: float) -> None:
    parameters, (points, values) = network(3, 32, 2, 1, 2, 2), data(100, 2, 2)
    options: dict[str, Tensor] = {}
    if change == "signal_weights":
        options["signal_weights"] = torch.full((2,), size)
    elif change == "mask":
        options["point_weights"] = torch.full((100,), 1e-12).index_fill(0, torch.tensor([3]), size)
    else:
        values = values * size
    results = []
    for implementation, precision in (("triton", "fp16"), ("torch", "fp32")):
        total, _ = strainer_mse(
            points, values, *parameters, implementation=implementation, precision=precision, **options
        )
        results.append(torch.autograd.grad(total, parameters[0]))
    for got, want in zip(*results, strict=True):
        assert relative(got, want) <= 16 * UNIT["fp16"]


def test_no_sine_layer_with_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer blocks of rows than partial sums: what nobody wrote must not count."""
    row = Row("forward", "interpreter", ("half", "tf32", "fp32"), 1 << 20, Tiles(32, 64, 64))
    rest = [r for r in configs.TABLE if (r.kernel, r.generation) != ("forward", "interpreter")]
    monkeypatch.setattr(configs, "TABLE", (*rest, row))
    parameters, given = network(1, 8, 2, 3, 2, 0), data(50, 2, 2, 3)
    for g, e in zip(ours(*given, *parameters), truth(*given, *parameters, torch.float64), strict=False):
        assert relative(g, e) <= 1e-5


def test_waves_change_only_the_rounding() -> None:
    parameters, given = network(4, 20, 2, 2, 3, 2), data(300, 2, 3, 2)
    whole, waves = (ours(*given, *parameters, tile=tile, want_points=True) for tile in (None, 128))
    for a, b in zip(whole, waves, strict=True):
        assert relative(b, a) <= 1e-5


def test_omega_per_layer_weights_and_no_bias() -> None:
    weights, biases = network(4, 16, 2, 1, 2, 3)
    points, values = data(60, 2, 2)
    omegas, signal_weights, mask = (30.0, 12.0, 4.5), torch.tensor([2.0, 0.5]), (torch.rand(2, 60) > 0.3).float()
    results = []
    for implementation in ("triton", "torch"):
        total, losses = strainer_mse(
            points, values, weights, [*biases[:2], None, biases[3]], omegas, signal_weights=signal_weights,
            point_weights=mask, implementation=implementation,
        )  # fmt: skip
        results.append([losses, *torch.autograd.grad(total, [*weights, *biases[:2]])])
    for a, b in zip(*results, strict=True):
        assert relative(a, b) <= 1e-5


@pytest.mark.parametrize("kind", ["plain", "heads", "stack", "frozen", "ragged waves"])
def test_chains_give_what_layers_do(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles as wide as the layers all of them go in one launch, forwards and back."""
    weights, biases = network(5, 32, 2, 2, 3, {"plain": None, "heads": 4, "stack": 0}.get(kind))
    points, values = data(300 if kind == "ragged waves" else 90, 2, 3 if kind in ("heads", "stack") else 1, 2)
    if kind == "frozen":
        for p in (weights[0], biases[0]):
            p.requires_grad_(False)
    wanted = [p for p in (*weights, *biases) if p.requires_grad]

    def run() -> list[Tensor]:
        tile = 128 if kind == "ragged waves" else None
        total, losses = strainer_mse(points, values, weights, biases, implementation="triton", tile=tile)
        return [losses, *torch.autograd.grad(total, wanted)]

    before, layers = wanted, run()
    rows = [
        Row(kernel, "interpreter", ("half", "tf32", "fp32"), 32, Tiles(128, 32, 32))
        for kernel in ("forward", "input_gradient")
    ]
    monkeypatch.setattr(configs, "TABLE", (*rows, *configs.TABLE))
    calls: list[str] = []
    for name in ("launch_forward_chain", "launch_gradient_chain", "launch_forward", "launch_input_gradient"):
        launch = getattr(pipeline, name)
        monkeypatch.setattr(
            pipeline, name, lambda *a, launch=launch, name=name, **k: (calls.append(name), launch(*a, **k))
        )
    monkeypatch.setattr(pipeline.Plan, "_fits_on_chip", lambda self: False)
    chained = run()
    for a, b in zip(chained, layers, strict=True):
        assert relative(a, b) <= 1e-5
    waves = 3 if kind == "ragged waves" else 1
    assert calls == ["launch_forward_chain", "launch_gradient_chain"] * waves
    calls.clear()
    for p in (*weights[:2], *biases[:2]):
        p.requires_grad_(False)
    wanted = [weights[-1]]
    assert relative(run()[1], layers[[id(p) for p in before].index(id(weights[-1])) + 1]) <= 1e-5
    assert "launch_forward_chain" not in calls  # cosines of some layers only


@pytest.mark.parametrize("frozen", [1, 2, 3])
def test_a_frozen_prefix_gets_and_costs_no_gradient(frozen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights, biases = network(4, 160, 2, 1, 1, None)
    given = data(60)
    exact = truth(*given, weights, biases, torch.float64)
    for p in (*weights[:frozen], *biases[:frozen]):
        p.requires_grad_(False)
    calls: list[str] = []
    for name in ("launch_weight_gradient", "launch_input_gradient"):
        launch = getattr(pipeline, name)

        def counted(dz: torch.Tensor, *a: Any, launch: Any = launch, name: str = name, **k: Any) -> None:
            calls.extend([name] * (len(dz) if dz.ndim == 4 else 1))  # layers of one shape share a launch
            launch(dz, *a, **k)

        monkeypatch.setattr(pipeline, name, counted)
    loss = siren_mse(given[0], given[1][0], weights, biases, implementation="triton")
    got = torch.autograd.grad(loss, [*weights[frozen:], *biases[frozen:]])
    for g, e in zip(got, [*exact[1 + frozen : 5], *exact[5 + frozen : 9]], strict=True):
        assert relative(g, e) <= 1e-5
    # The head's gradients and the last dz come from one kernel.
    assert calls.count("launch_weight_gradient") == 3 - frozen
    assert calls.count("launch_input_gradient") == max(2 - frozen, 0)


def test_independent_losses_have_their_own_gradients_and_bits_repeat() -> None:
    weights, biases = network(3, 8, 2, 1, 4, 0)
    points, values = data(50, 2, 4)
    factors = torch.tensor([1.0, 0.0, -2.0, 0.5])
    results = []
    for implementation in ("triton", "triton", "torch"):
        losses = batched_siren_mse(points, values, weights, biases, implementation=implementation)
        results.append(torch.autograd.grad((losses * factors).sum(), weights))
    assert all(torch.equal(a, b) for a, b in zip(*results[:2], strict=True))
    for a, b in zip(*results[1:], strict=True):
        assert relative(a, b) <= 1e-5


def test_strided_expanded_and_misaligned_inputs() -> None:
    weights, biases = network(3, 8, 2, 2, 1, None)
    points, values = data(41, 2, 1, 2)
    expected = siren_mse(points[1:], values[0, 1:], weights, biases, implementation="triton")
    strided = [w.detach().t().contiguous().t().requires_grad_() for w in weights]
    values = values[0].t().contiguous().t()
    loss = siren_mse(points[1:], values[1:], strided, biases, implementation="triton")
    assert torch.equal(loss, expected)
    constant = torch.full((1, 1), 0.5).expand(41, 2)
    assert siren_mse(points, constant, weights, biases, implementation="triton").isfinite()


@pytest.mark.parametrize("num_shared", [0, 2, 3])
def test_opcheck(num_shared: int) -> None:
    weights, biases = network(4, 4, 2, 1, 2, num_shared)
    points, values = data(10, 2, 2)
    parameters = [p.detach() for pair in zip(weights, biases, strict=True) for p in pair]
    wanted = [True, False, *[True] * 6]
    arguments = (
        "triton",
        points,
        values,
        parameters,
        [30.0] * 3,
        wanted,
        True,
        torch.rand(2),
        torch.rand(10),
        None,
        "fp32",
    )
    torch.library.opcheck(_sweep, arguments)


# PyTorch's tracer instantiates the Function and warns about itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("implementation", ["triton", "auto"])
def test_compiles_without_a_break(implementation: str) -> None:
    weights, biases = network(3, 8, 2, 1, 1, None)
    points, values = data(20)

    def loss() -> Tensor:
        return siren_mse(points, values[0], weights, biases, implementation=implementation)

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for got, want in zip(*(torch.autograd.grad(f(), weights) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(got, want)


def test_no_points_and_twice_differentiated() -> None:
    weights, biases = network(3, 8, 2, 1, 1, None)
    loss = siren_mse(torch.zeros(0, 2), torch.zeros(0, 1), weights, biases, implementation="triton")
    assert loss.isnan()
    points, values = data(9)
    loss = siren_mse(points, values[0], weights, biases, implementation="triton")
    (gradient,) = torch.autograd.grad(loss, weights[1], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(gradient.sum(), weights[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "fp8"}, "precision: expected one of 'fp32', 'tf32x3', 'tf32', 'fp16', 'bf16'"),
        ({"precision": "fp16", "implementation": "tiled"}, "precision: expected 'fp32' with implementation 'tiled'"),
    ],
    ids=["unknown", "not_rounded_there"],
)
def test_unusable_precision(change: dict[str, str], message: str) -> None:
    points, values = data(9)
    with pytest.raises(sf.InputError, match=message):
        siren_mse(points, values[0], *network(3, 8, 2, 1, 1, None), **({"implementation": "triton"} | change))


def test_float64_is_refused_by_name() -> None:
    points, values = (t.double() for t in data(9))
    weights, biases = ([p.double() for p in ps] for ps in network(3, 8, 2, 1, 1, None))
    with pytest.raises(sf.InputError, match=r"compute in float32, not float64\. Use 'auto'"):
        siren_mse(points, values[0], weights, biases, implementation="triton")


VALUES = {
    "on_chip": (4, 20, 2, 3, 1, None),
    "by_layers": (4, 300, 2, 1, 1, None),
    "shared_encoder": (4, 16, 2, 2, 3, 3),
    "stack": (3, 16, 2, 2, 3, 0),
    "deep_decoders": (4, 16, 2, 2, 3, 2),
    "no_sine_layer": (1, 8, 2, 3, 1, None),
}


@pytest.mark.parametrize("case", VALUES.values(), ids=VALUES.keys())
def test_values_without_gradients(case: tuple[int, ...]) -> None:
    weights, biases = network(*case)
    points = data(70)[0]
    want = reference.siren(points, weights, biases).detach()
    got = siren_values(points, weights, biases, implementation="triton")
    assert got.shape == want.shape
    assert not got.requires_grad
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    rounded = siren_values(points, weights, biases, implementation="triton", precision="fp16")
    assert relative(rounded, want) <= 40 * UNIT["fp16"]


@pytest.mark.parametrize("case", [(6, 256, 2, 3, 1, None), (6, 300, 2, 3, 1, None)], ids=["on_chip", "by_layers"])
def test_rendering_by_three_products_is_rendering_in_fp32(case: tuple[int, ...]) -> None:
    """What `render` does on a GPU, on the paper's network: within 1e-5, and the same 8 bits but on the edge of two."""
    weights, biases = network(*case)
    weights[-1] = 3 * weights[-1]
    biases[-1] = biases[-1] + 0.5  # values in [0, 1], as of images
    points = data(400)[0]
    exact = reference.siren(points.double(), *([p.double() for p in own] for own in (weights, biases))).detach()
    fp32, ours = (
        siren_values(points, weights, biases, implementation="triton", precision=p) for p in ("fp32", "tf32x3")
    )
    assert float((ours - fp32).abs().max()) <= 1e-5
    assert float((ours - exact).abs().max()) <= 1e-5
    levels = 255 * exact.clamp(0, 1)
    inside = (levels - levels.floor() - 0.5).abs() > 255e-5
    assert inside.float().mean() > 0.98
    assert float(exact.std()) > 0.05
    assert bool((quantised(ours, 8) == quantised(exact, 8))[inside.numpy()].all())

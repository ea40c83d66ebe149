"""The one-pass losses: gradients against autograd and float64, and life inside autograd."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.ops import batched_siren_mse, siren_mse, strainer_mse
from strainer_fast.ops.one_pass import _sweep

Parameters = tuple[list[Tensor], list[Tensor]]


def network(
    num_layers: int = 4,
    width: int = 8,
    inputs: int = 2,
    channels: int = 1,
    num_signals: int = 1,
    num_shared: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> Parameters:
    """Weights and biases by SIREN's rules; layers from `num_shared` on are stacked (None: a plain network)."""
    weights, biases = [], []
    for i in range(num_layers):
        stack = () if num_shared is None or i < num_shared else (num_signals,)
        shape = (channels if i == num_layers - 1 else width, inputs if i == 0 else width)
        weight, bias = torch.empty(*stack, *shape, dtype=dtype), torch.empty(*stack, shape[0], dtype=dtype)
        sf.nn.init.init_linear_(weight, bias, 30.0, is_first=i == 0)
        weights.append(weight.requires_grad_())
        biases.append(bias.requires_grad_())
    return weights, biases


def data(num_points: int, inputs: int = 2, num_signals: int = 1, channels: int = 1, dtype: torch.dtype = torch.float32):
    return (
        torch.rand(num_points, inputs, dtype=dtype) * 2 - 1,
        torch.rand(num_signals, num_points, channels, dtype=dtype),
    )


def autograd(
    points: Tensor, values: Tensor, parameters: Parameters, omega: object, wanted: list[Tensor]
) -> list[Tensor]:
    prediction = reference.siren(points, *parameters, omega)
    losses = reference.mse(prediction if prediction.ndim == 3 else prediction.unsqueeze(0), values)
    return [losses, *torch.autograd.grad(losses.sum(), wanted)]


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


def errors(
    engine: str, points: Tensor, values: Tensor, parameters: Parameters, omega: object = 30.0, **options: object
) -> tuple[Tensor, Tensor]:
    """Relative errors by norm against float64, of the losses and of each gradient: ours, and autograd's in float32."""
    wanted = [*parameters[0], *parameters[1]]
    total, losses = strainer_mse(points, values, *parameters, omega, implementation=engine, **options)
    ours = [losses, *torch.autograd.grad(total, wanted)]
    single = autograd(points, values, parameters, omega, wanted)
    twins = [p.detach().double().requires_grad_() for p in wanted]
    count = len(parameters[0])
    exact = autograd(points.double(), values.double(), (twins[:count], twins[count:]), omega, twins)
    each = zip(ours, single, exact, strict=True)
    pairs = [(relative(got, truth), relative(peer, truth)) for got, peer, truth in each]
    return torch.tensor(pairs).unbind(1)


def assert_as_exact_as_autograd(ours: Tensor, peer: Tensor) -> None:
    """At most max(1e-5, twice what autograd makes in float32)."""
    assert (ours <= (2 * peer).clamp_min(1e-5)).all(), (ours, peer)


AXES = {
    "width": [1, 3, 33, 64, 178, 256],
    "num_layers": [1, 2, 3, 5, 8],
    "inputs": [1, 2, 3],
    "channels": [1, 3, 7],
    "points": [1, 255, 256, 257, 1000],
    "signals": [1, 2, 10],
}
USUAL = {"width": 32, "num_layers": 4, "inputs": 2, "channels": 1, "points": 300, "signals": 3}
CASES = [pytest.param(USUAL | {axis: n}, id=f"{axis}_{n}") for axis, sizes in AXES.items() for n in sizes]


@pytest.mark.parametrize("kind", ["heads", "deep", "independent"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: dict[str, int], kind: str, engine: str) -> None:
    layers = case["num_layers"]
    num_shared = {"heads": layers - 1, "deep": max(layers - 2, 0), "independent": 0}[kind]
    # At width 1 a gradient is one sum of terms of either sign, whose error in one draw is luck: median of several.
    draws = []
    for _ in range(15 if case["width"] == 1 else 1):
        parameters = network(layers, case["width"], case["inputs"], case["channels"], case["signals"], num_shared)
        points, values = data(case["points"], case["inputs"], case["signals"], case["channels"])
        draws.append(torch.stack(errors(engine, points, values, parameters)))
    assert_as_exact_as_autograd(*torch.stack(draws).median(0).values)


@pytest.mark.long
@pytest.mark.parametrize("width", [256, 512])
@pytest.mark.parametrize("num_layers", [2, 6, 8])
@pytest.mark.parametrize("channels", [1, 7])
def test_gradients_at_full_size(width: int, num_layers: int, channels: int, engine: str) -> None:
    parameters = network(num_layers, width, 2, channels, 3, num_layers - 1)
    assert_as_exact_as_autograd(*errors(engine, *data(31_684, 2, 3, channels), parameters))


def test_omega_per_layer(engine: str) -> None:
    parameters = network(4, 16, num_signals=3, num_shared=2)
    assert_as_exact_as_autograd(*errors(engine, *data(300, num_signals=3), parameters, (30.0, 12.0, 4.5)))


@pytest.mark.parametrize("tile", [1, 7, 64, 100, 1000])
def test_tile_size_only_changes_the_rounding(tile: int, engine: str) -> None:
    parameters = network(4, 16, num_signals=3, num_shared=2)
    assert_as_exact_as_autograd(*errors(engine, *data(300, num_signals=3), parameters, tile=tile))


def test_many_small_networks_in_groups(engine: str) -> None:
    parameters = network(4, 32, num_signals=40, num_shared=0)
    assert_as_exact_as_autograd(*errors(engine, *data(784, num_signals=40), parameters))


@pytest.mark.parametrize("kind", ["plain", "heads", "deep", "independent"])
def test_gradcheck(kind: str) -> None:
    num_shared = {"plain": None, "heads": 3, "deep": 2, "independent": 0}[kind]
    num_signals = 1 if kind == "plain" else 2
    weights, biases = network(4, 4, 2, 2, num_signals, num_shared, torch.float64)
    points, values = data(9, 2, num_signals, 2, torch.float64)
    points.requires_grad_(kind != "independent")
    weighting = torch.rand(9, dtype=torch.float64)

    def loss(points: Tensor, *parameters: Tensor) -> Tensor:
        w, b = parameters[:4], parameters[4:]
        if kind == "plain":
            return siren_mse(points, values[0], w, b, 3.0, point_weights=weighting, tile=4, implementation="tiled")
        if kind == "independent":
            return batched_siren_mse(points, values, w, b, 3.0, point_weights=weighting, tile=4, implementation="tiled")
        signal_weights = torch.tensor([0.3, 2.0], dtype=torch.float64)
        options = {"signal_weights": signal_weights, "point_weights": weighting, "tile": 4, "implementation": "tiled"}
        return strainer_mse(points, values, w, b, 3.0, **options)[0]

    assert torch.autograd.gradcheck(loss, (points, *weights, *biases))


@pytest.mark.parametrize("weighting", ["mask", "per_signal"])
def test_point_weights_agree_with_autograd(weighting: str, engine: str) -> None:
    parameters = network(3, 8, num_signals=2, num_shared=2)
    points, values = data(50, num_signals=2)
    weights = (torch.rand(50) > 0.4).float() if weighting == "mask" else torch.rand(2, 50)
    results = []
    for implementation in (engine, "torch"):
        total, losses = strainer_mse(
            points, values, *parameters, point_weights=weights, signal_weights=torch.tensor([2.0, 0.5]),
            implementation=implementation, tile=16,
        )  # fmt: skip
        results.append([losses, total, *torch.autograd.grad(total, [*parameters[0], *parameters[1]])])
    for a, b in zip(*results, strict=True):
        assert relative(a, b.detach()) < 1e-5
    if weighting == "mask":
        kept = weights.bool()
        expected = reference.mse(reference.siren(points[kept], *parameters), values[:, kept])
        torch.testing.assert_close(results[0][0], expected.detach())


def test_independent_losses_have_their_own_gradients(engine: str) -> None:
    weights, biases = network(3, 8, num_signals=4, num_shared=0)
    points, values = data(50, num_signals=4)
    losses = batched_siren_mse(points, values, weights, biases, implementation=engine)
    factors = torch.tensor([1.0, 0.0, -2.0, 0.5])
    ours = torch.autograd.grad((losses * factors).sum(), weights)
    truth = batched_siren_mse(points, values, weights, biases, implementation="torch")
    for a, b in zip(ours, torch.autograd.grad((truth * factors).sum(), weights), strict=True):
        assert relative(a, b) < 1e-5
    assert torch.equal(ours[0][1], torch.zeros_like(ours[0][1]))


@pytest.mark.parametrize("threads", [1, 2])
def test_same_bits_every_time(threads: int, engine: str) -> None:
    parameters, (points, values) = network(4, 64, num_signals=3, num_shared=3), data(9000, num_signals=3)
    torch.set_num_threads(threads)
    try:
        first, second = (
            torch.autograd.grad(strainer_mse(points, values, *parameters, implementation=engine)[0], parameters[0])
            for _ in range(2)
        )
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_strided_expanded_and_float64_inputs(engine: str) -> None:
    weights, biases = network(3, 8, channels=2)
    points, values = data(40, channels=2)
    expected = siren_mse(points, values[0], weights, biases, implementation=engine)
    strided_points = torch.stack([points, points], dim=-1)[..., 0]
    strided_values = values[0].t().contiguous().t()
    strided_weights = [w.detach().t().contiguous().t().requires_grad_() for w in weights]
    loss = siren_mse(strided_points, strided_values, strided_weights, biases, implementation=engine)
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, strided_weights), torch.autograd.grad(expected, weights), strict=True):
        torch.testing.assert_close(a, b)
    constant = torch.full((1, 1), 0.5).expand(40, 2)
    assert siren_mse(points, constant, weights, biases, implementation=engine).isfinite()
    shared_start = [w.detach()[None].expand(3, *w.shape) for w in weights]
    losses = batched_siren_mse(points, values.expand(3, -1, -1), shared_start, [b[None].expand(3, -1) for b in biases])
    torch.testing.assert_close(losses, expected.detach().expand(3))


def test_strided_heads_and_stacks(engine: str) -> None:
    weights, biases = network(3, 8, channels=2, num_signals=3, num_shared=2)
    points, values = data(40, num_signals=3, channels=2)
    strided = [w.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for w in weights]
    for a, b in zip(
        torch.autograd.grad(strainer_mse(points, values, strided, biases, implementation=engine)[0], strided),
        torch.autograd.grad(strainer_mse(points, values, weights, biases, implementation=engine)[0], weights),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_no_points(engine: str) -> None:
    weights, biases = network(3, 8)
    loss = siren_mse(torch.zeros(0, 2), torch.zeros(0, 1), weights, biases, implementation=engine)
    assert loss.isnan()  # as the mean of nothing in PyTorch
    assert all((g == 0).all() for g in torch.autograd.grad(loss, weights))


def test_missing_biases(engine: str) -> None:
    weights, _ = network(3, 8)
    points, values = data(20)
    ours, truth = (siren_mse(points, values[0], weights, [None] * 3, implementation=i) for i in (engine, "torch"))
    torch.testing.assert_close(ours, truth)
    for a, b in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(truth, weights), strict=True):
        assert relative(a, b) < 1e-5


def counting(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, ...]]:
    """What each sweep was asked to compute."""
    from strainer_fast.ops import tiled

    asked: list[tuple[bool, ...]] = []
    real = tiled.sweep

    def spy(
        points: Tensor, values: Tensor, parameters: object, omegas: object, wanted: object, *rest: object
    ) -> object:
        asked.append(tuple(wanted))
        return real(points, values, parameters, omegas, wanted, *rest)

    monkeypatch.setattr(tiled, "sweep", spy)
    return asked


def test_without_grad_mode_nothing_is_computed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counting(monkeypatch)
    model = sf.Siren(2, 8, 3, 1)
    points, values = data(20)
    with torch.no_grad():
        loss = model.loss(points, values[0], implementation="tiled")
    assert not loss.requires_grad
    model.requires_grad_(False)
    model.loss(points, values[0], implementation="tiled")
    assert asked == [(False,) * 6] * 2


def test_a_frozen_prefix_costs_no_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = counting(monkeypatch)
    products: list[str] = []
    from strainer_fast.ops.tiled import _Layer

    for name in ("product", "accumulate", "input_gradient"):
        real = getattr(_Layer, name)

        def spy(
            self: _Layer, *args: object, name: str = name, real: Callable[..., object] = real, **options: object
        ) -> object:
            products.append(name)
            return real(self, *args, **options)

        monkeypatch.setattr(_Layer, name, spy)
    model = sf.Strainer(2, 8, 5, 1, 3, 2)
    model.encoder.requires_grad_(False)
    total, _ = model.loss(*data(20, num_signals=2), implementation="tiled")
    total.backward()
    assert asked == [(False,) * 6 + (True,) * 4]
    assert products.count("product") == 5
    assert products.count("accumulate") == 2  # head and one decoder layer
    assert products.count("input_gradient") == 1  # from the head to that layer, and no further
    assert model.encoder.layers[0].weight.grad is None


@pytest.mark.parametrize("frozen", [[0], [1], [3], [0, 1], [0, 2], [1, 2, 3]], ids=str)
def test_any_layers_may_be_frozen(frozen: list[int], engine: str) -> None:
    weights, biases = network(4, 8, num_signals=2, num_shared=2)
    for i in frozen:
        weights[i].requires_grad_(False)
        biases[i].requires_grad_(i == 2)  # a bias may train while its weight does not
    points, values = data(30, num_signals=2)
    wanted = [p for p in (*weights, *biases) if p.requires_grad]
    ours, truth = (
        torch.autograd.grad(strainer_mse(points, values, weights, biases, implementation=i)[0], wanted)
        for i in (engine, "torch")
    )
    for a, b in zip(ours, truth, strict=True):
        assert relative(a, b) < 1e-5


def test_accumulation_two_losses_and_retained_graphs(engine: str) -> None:
    model = sf.Siren(2, 8, 3, 1)
    twin = copy.deepcopy(model)
    (x1, y1), (x2, y2) = data(20), data(30)
    first, second = model.loss(x1, y1[0], implementation=engine), model.loss(x2, y2[0], implementation=engine)
    (first * 2).backward(retain_graph=True)
    second.backward()
    first.backward()
    (3 * twin.loss(x1, y1[0], implementation="torch") + twin.loss(x2, y2[0], implementation="torch")).backward()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert relative(a.grad, b.grad) < 1e-5


@pytest.mark.parametrize("how", ["plain", "times_weights", "penalty"])
def test_differentiating_twice_raises(how: str) -> None:
    weights, biases = network(3, 4, dtype=torch.float64)
    points, values = data(10, dtype=torch.float64)
    loss = siren_mse(points, values[0], weights, biases, implementation="tiled")
    if how == "times_weights":
        loss = loss * weights[1].sum()
    (gradient,) = torch.autograd.grad(loss, weights[1], create_graph=True)
    target = gradient.sum() if how != "penalty" else gradient.square().sum() + loss
    with pytest.raises(RuntimeError, match=r"differentiated once.*implementation='torch'"):
        torch.autograd.grad(target, weights[0])


def test_second_derivatives_where_the_reason_says() -> None:
    weights, biases = network(3, 3, dtype=torch.float64)
    points, values = data(5, dtype=torch.float64)

    def loss(*parameters: Tensor) -> Tensor:
        return siren_mse(points, values[0], parameters[:3], parameters[3:], 2.0, implementation="torch")

    assert torch.autograd.gradgradcheck(loss, (*weights, *biases))


def test_gradients_of_points(engine: str) -> None:
    weights, biases = network(4, 8, num_signals=3, num_shared=2)
    points, values = data(70, num_signals=3)
    points.requires_grad_()
    ours, truth = (
        torch.autograd.grad(strainer_mse(points, values, weights, biases, implementation=i)[0], points)[0]
        for i in (engine, "torch")
    )
    assert relative(ours, truth) < 1e-5


def test_models_have_losses(engine: str) -> None:
    points, values = data(40, num_signals=3, channels=2)
    for implementation in (engine, "torch", "auto"):
        siren = sf.Siren(2, 8, 3, 2)
        expected = torch.nn.functional.mse_loss(siren(points), values[0])
        torch.testing.assert_close(siren.loss(points, values[0], implementation=implementation), expected)
        strainer = sf.Strainer(2, 8, 4, 2, 2, 3)
        total, each = strainer.loss(points, values, implementation=implementation)
        torch.testing.assert_close(each, reference.mse(strainer(points), values).detach())
        torch.testing.assert_close(total, reference.mse(strainer(points), values).sum())
        assert not each.requires_grad
        batched = sf.BatchedSiren(3, 2, 8, 3, 2)
        losses = batched.loss(points, values, implementation=implementation)
        torch.testing.assert_close(losses, reference.mse(batched(points), values))


def test_a_strangers_loop_with_lbfgs_and_autocast(engine: str) -> None:
    model = sf.Siren(2, 16, 3, 1)
    points = sf.signals.grid((10, 10))
    values = (points[:, :1] * points[:, 1:]).abs()
    before = model.loss(points, values).item()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(points, values, implementation=engine)
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = model.loss(points, values, implementation=engine).item()
    assert inside == model.loss(points, values, implementation=engine).item() < 0.3 * before


@pytest.mark.parametrize("want_points", [False, True])
@pytest.mark.parametrize("num_shared", [0, 2, 3])
def test_opcheck(num_shared: int, want_points: bool, engine: str) -> None:
    weights, biases = network(4, 4, num_signals=2, num_shared=num_shared)
    points, values = data(10, num_signals=2)
    parameters = [p.detach() for pair in zip(weights, biases, strict=True) for p in pair]
    wanted = [True, False, *[True] * 6]
    torch.library.opcheck(
        _sweep,
        (engine, points, values, parameters, [30.0] * 3, wanted, want_points, torch.rand(2), torch.rand(10), 4, "fp32"),
    )


# PyTorch's tracer instantiates the Function and warns about itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_into_a_strangers_graph(engine: str) -> None:
    points, values = data(40)
    weights, biases = network(3, 8)

    def penalised(weights: list[Tensor], biases: list[Tensor]) -> Tensor:
        return siren_mse(points, values[0], weights, biases, implementation=engine) + 0.1 * weights[0].square().sum()

    compiled = torch.compile(penalised, backend="aot_eager")
    ours, truth = (torch.autograd.grad(f(weights, biases), weights) for f in (compiled, penalised))
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


BAD = {
    "points": ({"points": torch.zeros(5, 3)}, r"weights\[0\]: expected shape \['out', 3\], got \[8, 2\]"),
    "count": ({"values": torch.zeros(1, 6, 1)}, r"\[P, in\] and \[N, P, C\] of the same P"),
    "channels": ({"values": torch.zeros(1, 5, 2)}, "one output per channel"),
    "signals": ({"values": torch.zeros(2, 5, 1)}, "stacked per signal"),
    "dtype": ({"values": torch.zeros(1, 5, 1, dtype=torch.float64)}, "values: expected torch.float32 on cpu, as the p"),
    "half": ({"points": torch.zeros(5, 2).half()}, "values: expected torch.float16"),
    "target_gradient": ({"values": torch.zeros(1, 5, 1, requires_grad=True)}, "Targets are constants"),
    "omega": ({"omega": (1.0, 2.0, 3.0)}, "each of the 2 sine layers"),
    "biases": ({"biases": [None]}, "one .or None. per weight"),
    "bias": ({"biases": [None, None, torch.zeros(3)]}, r"biases\[2\]: expected shape \[1\], got \[3\]"),
    "signal_weights": ({"signal_weights": torch.zeros(2)}, "signal_weights"),
    "point_weights": ({"point_weights": torch.zeros(4)}, "point_weights"),
    "tile": ({"tile": 0}, "tile"),
    "implementation": (
        {"implementation": "fast"},
        "implementation: expected one of 'auto', 'triton', 'native', 'tiled', 'torch'",
    ),
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_unusable_input(change: tuple[dict[str, object], str]) -> None:
    weights, biases = network(3, 8)
    arguments = {"points": torch.zeros(5, 2), "values": torch.zeros(1, 5, 1), "weights": weights, "biases": biases}
    with pytest.raises(sf.InputError, match=change[1]):
        strainer_mse(**arguments | change[0])


def test_gradients_of_points_of_independent_networks_are_refused(engine: str) -> None:
    weights, biases = network(3, 8, num_signals=2, num_shared=0)
    points, values = data(5, num_signals=2)
    with pytest.raises(sf.InputError, match="N independent losses share them"):
        batched_siren_mse(points.requires_grad_(), values, weights, biases, implementation=engine)

"""What is the native engine's own: its sine, bad numbers, odd memory, threads, levels, and life without it."""

import ctypes
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast.kernels import cpu
from strainer_fast.kernels.cpu import loading
from strainer_fast.ops import batched_siren_mse, choose, native, siren_mse, siren_values, strainer_mse

here = pytest.mark.skipif(cpu.level() is None, reason=f"not run: the native engine is {cpu.missing()}")


@pytest.fixture(params=cpu.LEVELS)
def level(request: pytest.FixtureRequest):
    if request.param not in cpu.available():
        pytest.skip(f"not run: no {request.param} here ({cpu.missing() or 'the CPU lacks it'})")
    with cpu.forced(request.param):
        yield request.param


def sincos(x: Tensor) -> tuple[Tensor, Tensor]:
    sine, cosine = (torch.full_like(x, math.nan) for _ in range(2))
    cpu.sincos(x, sine, cosine)
    return sine, cosine


def test_it_is_built_where_a_compiler_is() -> None:
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("not run: no compiler here")
    assert cpu.available(), cpu.missing()
    assert cpu.available()[-1] == "portable"


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 10.0, 100.0, 1e4, 1e6, 1e7, 1e20, 3e38])
def test_sine_and_cosine(scale: float, level: str) -> None:
    x = torch.cat([torch.linspace(-1, 1, 10_007), torch.rand(10_000) * 2 - 1]) * scale
    for got, truth in zip(sincos(x), (x.double().sin(), x.double().cos()), strict=True):
        assert float((got - truth).abs().max()) <= 1e-7


def test_sine_and_cosine_near_multiples_of_a_quarter_turn(level: str) -> None:
    turns = torch.arange(-20_000, 20_001, dtype=torch.float64) * (math.pi / 2)
    x = torch.cat(
        [turns.float(), turns.float().nextafter(torch.tensor(1e9)), turns.float().nextafter(torch.tensor(0.0))]
    )
    for got, truth in zip(sincos(x), (x.double().sin(), x.double().cos()), strict=True):
        assert float((got - truth).abs().max()) <= 1e-7


def test_sine_of_what_is_no_number(level: str) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-40])
    sine, cosine = sincos(x)
    assert sine[2:5].isnan().all() and cosine[2:5].isnan().all()
    assert torch.equal(sine[[0, 1, 5, 6]], x[[0, 1, 5, 6]])
    assert torch.equal(cosine[[0, 1, 5, 6]], torch.ones(4))


def layers(width: int = 33, num: int | None = None, inputs: int = 2, channels: int = 2) -> tuple[list[Tensor], list]:
    shapes = [(width, inputs), (width, width), (channels, width)]
    stack = () if num is None else (num,)
    return (
        [(torch.rand(*stack, *s) - 0.5).div(s[1]).requires_grad_() for s in shapes],
        [(torch.rand(*stack, s[0]) - 0.5).requires_grad_() for s in shapes],
    )


def gradients(points: Tensor, values: Tensor, weights: list, biases: list, implementation: str, **options: object):
    total, losses = strainer_mse(points, values, weights, biases, implementation=implementation, **options)
    return [losses, *torch.autograd.grad(total, [*weights, *biases])]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, equal_nan=True)


@here
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["points", "values", "weights", "biases"])
def test_bad_numbers_in_are_bad_numbers_out(where: str, poison: float, level: str) -> None:
    weights, biases = layers()
    points, values = torch.rand(40, 2), torch.rand(1, 40, 2)
    with torch.no_grad():
        {"points": points, "values": values, "weights": weights[1], "biases": biases[0]}[where].flatten()[7] = poison
    ours, truth = (gradients(points, values, weights, biases, i) for i in ("native", "torch"))
    for a, b in zip(ours, truth, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite())


@here
def test_large_arguments_and_denormals(level: str) -> None:
    weights, biases = layers()
    values = torch.rand(1, 40, 2)
    for scale in (1e-42, 1.0, 1e5, 1e7):
        points = torch.rand(40, 2) * scale
        twins = [p.detach().double().requires_grad_() for p in (*weights, *biases)]
        ours = gradients(points, values, weights, biases, "native")
        if scale > 1:  # float32 leaves no digit of such a phase; sine and cosine themselves are tested above
            assert all(g.isfinite().all() for g in ours)
            assert float(ours[0]) < 10
            continue
        truth = gradients(points, values, weights, biases, "torch")
        exact = gradients(points.double(), values.double(), twins[:3], twins[3:], "torch")
        for a, b, c in zip(ours, truth, exact, strict=True):
            assert float((a - c).norm()) <= max(1e-5 * float(c.norm()), 2 * float((b - c).norm()), 1e-38)


@here
@pytest.mark.parametrize("offset", [1, 3, 5])
def test_misaligned_memory(offset: int, level: str) -> None:
    def shifted(t: Tensor) -> Tensor:
        flat = torch.empty(t.numel() + offset, dtype=t.dtype)
        moved = flat[offset:].view(t.shape)
        moved.copy_(t.detach())
        assert moved.data_ptr() % 16 == 4 * offset % 16
        return moved.requires_grad_(t.requires_grad)

    weights, biases = layers()
    points, values = torch.rand(41, 2), torch.rand(1, 41, 2)
    moved = gradients(
        shifted(points), shifted(values), list(map(shifted, weights)), list(map(shifted, biases)), "native"
    )
    for a, b in zip(moved, gradients(points, values, weights, biases, "native"), strict=True):
        assert torch.equal(a, b)


@here
@pytest.mark.parametrize("kind", ["plain", "heads", "deep", "stack"])
@pytest.mark.parametrize("threads", [2, 3, 7])
def test_threads_only_change_the_rounding(threads: int, kind: str, level: str) -> None:
    shared = {"plain": 3, "heads": 2, "deep": 1, "stack": 0}[kind]
    num = 1 if kind == "plain" else 5
    weights, biases = layers(100)
    weights = [
        w.detach().expand(num, *w.shape).clone().requires_grad_() if i >= shared else w for i, w in enumerate(weights)
    ]
    biases = [
        b.detach().expand(num, *b.shape).clone().requires_grad_() if i >= shared else b for i, b in enumerate(biases)
    ]
    # Enough work that the threads are used.
    points, values = torch.rand(20_011, 2), torch.rand(num, 20_011, 2)
    one = gradients(points, values, weights, biases, "native")
    torch.set_num_threads(threads)
    try:
        several, again = (gradients(points, values, weights, biases, "native") for _ in range(2))
    finally:
        torch.set_num_threads(1)
    assert_same(several, one)
    assert all(torch.equal(a, b) for a, b in zip(several, again, strict=True))


@here
def test_pytorchs_threads_and_its_own_give_the_same_bits() -> None:
    weights, biases = layers(100)
    points, values = torch.rand(20_011, 2), torch.rand(1, 20_011, 2)
    pool = loading._pytorchs_pool()
    assert pool is not None or "libgomp" not in Path("/proc/self/maps").read_text()
    torch.set_num_threads(2)
    try:
        shared = gradients(points, values, weights, biases, "native")
        cpu.library().sf_use_pool(None)
        own = gradients(points, values, weights, biases, "native")
    finally:
        torch.set_num_threads(1)
        if pool is not None:
            cpu.library().sf_use_pool(ctypes.cast(pool.GOMP_parallel, ctypes.c_void_p))
    assert all(torch.equal(a, b) for a, b in zip(shared, own, strict=True))


@here
def test_unused_gradients_are_not_computed(level: str) -> None:
    weights, biases = layers()
    parameters = [p.detach() for pair in zip(weights, biases, strict=True) for p in pair]
    points, values = torch.rand(30, 2), torch.rand(1, 30, 2)
    swept = native.sweep(points, values, parameters, [30.0, 30.0], [False, False, False, True, True, False])
    everything = native.sweep(points, values, parameters, [30.0, 30.0], [True] * 6)
    assert [g is None for g in swept.gradients] == [True, True, True, False, False, True]
    assert torch.equal(swept.gradients[3], everything.gradients[3])
    assert torch.equal(swept.gradients[4], everything.gradients[4])


@here
def test_gradients_of_points_summed_over_networks(level: str) -> None:
    weights, biases = layers(num=3)
    points, values = torch.rand(50, 2, requires_grad=True), torch.rand(3, 50, 2)
    ours, truth = (
        torch.autograd.grad(strainer_mse(points, values, weights, biases, implementation=i)[0], points)[0]
        for i in ("native", "torch")
    )
    torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-6)


@here
@pytest.mark.long
def test_huge_counts(level: str) -> None:
    # 2^24 points of 40 coordinates: offsets beyond 2^31 bytes.
    weights, biases = [torch.rand(1, 40)], [torch.rand(1)]
    points = torch.rand(1, 40).expand(2**24, 40).contiguous()
    values = torch.zeros(1, 1).expand(2**24, 1)
    loss = siren_mse(points, values, weights, biases, implementation="native")
    expected = (points[0].double() @ weights[0][0].double() + biases[0].double()).square()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)


@here
def test_only_float32_on_the_cpu() -> None:
    weights, biases = layers()
    double = [[p.detach().double() for p in group] for group in (weights, biases)]
    points, values = torch.rand(5, 2).double(), torch.rand(5, 2).double()
    with pytest.raises(sf.InputError, match=r"'native' in float32, got torch\.float64"):
        siren_mse(points, values, *double, implementation="native")
    assert siren_mse(points, values, *double).dtype == torch.float64  # auto: another engine
    assert choose("auto", torch.device("cpu"), torch.float64).name == "tiled"
    assert "float64" in choose("auto", torch.device("cpu"), torch.float64).reason
    with pytest.raises(sf.InputError, match="'native' on the CPU"):
        choose("native", torch.device("cuda"))


@here
def test_auto_by_level(level: str) -> None:
    choice = choose("auto", torch.device("cpu"))
    assert choice.name == ("tiled" if level == "portable" else "native")
    assert level == "portable" or level in choice.reason
    assert "AVX2" in choice.reason or level != "portable"
    assert choose("native", torch.device("cpu")).name == "native"


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level: expected one of"), cpu.forced("mmx"):
        pass


def test_life_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "not built: no C++ compiler"
    monkeypatch.setattr(loading, "_load", lambda: (None, reason))
    loading._best.cache_clear()
    try:
        assert cpu.level() is None
        assert cpu.available() == []
        choice = choose("auto", torch.device("cpu"))
        assert choice.name == "tiled"
        assert reason in choice.reason
        with pytest.raises(sf.InputError, match=r"an engine that is not built: .*Install strainer_fast where g"):
            choose("native", torch.device("cpu"))
        assert "step by step" in sf.explain("paper", [(8, 8, 1)], architecture=sf.Architecture(16, 3, 2))
        weights, biases = layers()
        assert siren_mse(torch.rand(5, 2), torch.rand(5, 2), weights, biases).isfinite()
        with pytest.raises(RuntimeError, match="the native engine is not built"):
            cpu.sincos(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    finally:
        monkeypatch.undo()
        loading._best.cache_clear()


def test_importing_does_not_load_it() -> None:
    code = (
        "import strainer_fast, strainer_fast.kernels.cpu.loading as l; "
        "import sys; assert l._load.cache_info().currsize == 0 and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@here
def test_no_signals() -> None:
    weights, biases = layers()
    weights[-1], biases[-1] = torch.rand(0, 2, 33, requires_grad=True), torch.rand(0, 2, requires_grad=True)
    total, losses = strainer_mse(torch.rand(5, 2), torch.rand(0, 5, 2), weights, biases, implementation="native")
    assert total.item() == 0
    assert losses.shape == (0,)
    assert float(torch.autograd.grad(total, weights[0])[0].abs().sum()) == 0


@here
def test_default_dtype_changes_nothing() -> None:
    weights, biases = layers()
    points, values = torch.rand(20, 2), torch.rand(20, 2)
    expected = siren_mse(points, values, weights, biases, implementation="native")
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(siren_mse(points, values, weights, biases, implementation="native"), expected)
    finally:
        torch.set_default_dtype(torch.float32)


@here
def test_many_networks_and_few(level: str) -> None:
    for num in (1, 2, 9):
        weights, biases = layers(8, num)
        points, values = torch.rand(20, 2), torch.rand(num, 20, 2)
        ours, truth = (
            torch.autograd.grad(batched_siren_mse(points, values, weights, biases, implementation=i).sum(), weights)
            for i in ("native", "torch")
        )
        assert_same(list(ours), list(truth))


@here
@pytest.mark.parametrize("points", [0, 1, 13, 500])
@pytest.mark.parametrize("channels", [1, 3, 7])
def test_values_of_networks(points: int, channels: int, level: str) -> None:
    """Plain, heads on shared layers, and independent ones, beside plain PyTorch."""
    torch.manual_seed(0)
    x = torch.rand(points, 2) * 2 - 1
    plain, stacked = layers(channels=channels), layers(num=3, channels=channels)
    heads = tuple([*a[:2], b[2]] for a, b in zip(plain, stacked, strict=True))
    for weights, biases in (plain, heads, stacked):
        ours, truth = (siren_values(x, weights, biases, implementation=i) for i in ("native", "torch"))
        assert ours.shape == truth.shape and not ours.requires_grad
        torch.testing.assert_close(ours, truth.detach(), rtol=1e-5, atol=1e-5)


@here
def test_values_by_threads_have_the_same_bits(level: str) -> None:
    weights, biases = layers(width=64)
    x, before, found = torch.rand(2000, 2), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(siren_values(x, weights, biases, implementation="native"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])

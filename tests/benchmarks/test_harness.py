"""The harness: a wrong result gets no time, FLOPs and bytes are counted right, and peers compute the same."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from strainer_fast.benchmarks import plugin, step_peers
from strainer_fast.benchmarks.bench_fit import curve_error
from strainer_fast.benchmarks.bench_render import RenderCase, RenderProblem
from strainer_fast.benchmarks.bench_render import providers as render_providers
from strainer_fast.benchmarks.cases import CASES, Case, Problem, named, truth_of
from strainer_fast.benchmarks.harness import (
    OURS,
    ParityError,
    Provider,
    Row,
    Running,
    equals,
    judge,
    machine,
    measure,
    missing,
)
from strainer_fast.benchmarks.layer_peers import LayerCase, LayerProblem, layer_providers
from strainer_fast.benchmarks.step_peers import providers

SMALL = [
    Case("one", 12, 8, 3),
    Case("heads", 12, 8, 3, num_signals=3, channels=2),
    Case("stack", 12, 8, 3, num_signals=3, independent=True),
]
LAYERS = [
    LayerCase("sine", "sine", 20, 8, 5),
    LayerCase("heads", "heads", 20, 8, 3, number=4),
    LayerCase("stack", "stack", 20, 8, 5, number=4),
]


class Clock:
    """What `measure` needs of pytest-benchmark's fixture."""

    def __init__(self) -> None:
        self.data: list[float] = []

    @property
    def stats(self) -> Any:
        return SimpleNamespace(stats=self)

    def pedantic(self, call: Callable[[], float], setup: Callable[[], None], rounds: int, iterations: int) -> None:
        for _ in range(rounds):
            setup()
            self.data.append(call())


def checked(found: list[Provider], problem: Any, truth: dict[str, torch.Tensor]) -> list[str]:
    """Names of those that ran; each equals the truth."""
    ran = []
    for provider in found:
        if missing(provider.package) is not None or "compile" in provider.name or "JAX" in provider.name:
            continue  # a compiler and half a minute; a process of its own: see below
        running = provider.build(problem)
        gate = equals(truth) if provider.gate is None else provider.gate(problem)
        row = gate(running.results())
        running.close()
        assert row["right"], (provider.name, row)
        ran.append(provider.name)
    return ran


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_steps_agree_with_float64(case: Case) -> None:
    problem = Problem.of(case)
    ran = checked(providers(case, "cpu", False), problem, named(truth_of(problem)))
    assert ran[:2] == [OURS, f"{OURS}, tiled"]
    assert {"one": "autograd", "heads": "heads in a loop", "stack": "torch.func.vmap"}[case.name] in ran


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)
def test_layers_agree_with_float64(case: LayerCase) -> None:
    problem = LayerProblem.of(case)
    ran = checked(layer_providers(case, False), problem, problem.truth())
    assert ran[0] == OURS and len(ran) >= 2


def test_renderings_agree_with_float64() -> None:
    import strainer_fast as sf

    torch.manual_seed(0)
    case = RenderCase("small", 20, ((-0.5, 0.0), (0.0, 0.5)))
    problem = RenderProblem(sf.Siren(2, 256, 6, 3), case, "cpu")
    ran = checked(render_providers(case, True), problem, problem.truth())
    assert {OURS, f"{OURS}, into a PNG", f"{OURS}, into a .npy", "PyTorch, in chunks"} <= set(ran)


def test_jax_and_siren_pytorch_agree_with_float64() -> None:
    """Where they are installed."""
    pytest.importorskip("jax", reason="not run: the extra peers is not installed")
    for case in SMALL:
        problem = Problem.of(case)
        truth = named(truth_of(problem))
        for provider in providers(case, "cpu", False):
            if provider.package is not None and missing(provider.package) is None:
                running = provider.build(problem)
                assert judge(running.results(), truth)["right"], provider.name
                assert running.seconds is None or running.seconds() > 0
                running.close()


class StandIn(torch.nn.Module):
    """What tinycudann.Network is documented to compute: no biases, ones that fill the input, half precision."""

    def __init__(self, inputs: int, outputs: int, settings: dict[str, Any]) -> None:
        super().__init__()
        assert (settings["otype"], settings["activation"]) == ("CutlassMLP", "Sine")
        self.outputs, self.fill, width = outputs, 16 - inputs, settings["n_neurons"]
        self.shapes = [(width, 16), *[(width, width)] * (settings["n_hidden_layers"] - 1), (16, width)]
        self.params = torch.nn.Parameter(torch.randn(sum(a * b for a, b in self.shapes)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.nn.functional.pad(x, (0, self.fill), value=1.0)
        *hidden, last = (
            part.reshape(shape)
            for part, shape in zip(self.params.split([a * b for a, b in self.shapes]), self.shapes, strict=True)
        )
        for weight in hidden:
            h = torch.sin(h @ weight.T)
        return (h @ last.T)[:, : self.outputs].half()


def test_tiny_cuda_nn_by_what_it_is_documented_to_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights' places, omegas and what it lacks; the package itself needs a GPU."""
    monkeypatch.setitem(sys.modules, "tinycudann", SimpleNamespace(Network=StandIn))
    problem = Problem.of(Case("one", 12, 8, 4, channels=3))
    running, gate = step_peers.tiny_cuda_nn(problem), step_peers.without_biases(problem)
    assert gate(running.results())["right"]
    with torch.no_grad():
        problem.parameters[2].mul_(1.1)
    assert not step_peers.without_biases(problem)(running.results())["right"]
    found = [p for p in providers(CASES[1], "cuda", True) if p.package == "tinycudann"]
    assert [p.gate for p in found] == [step_peers.without_biases]


@pytest.mark.parametrize("case", [*SMALL, CASES[1]], ids=lambda c: c.name)
def test_flops_are_those_of_the_products(case: Case) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    small = Case("", 12, case.width, case.num_layers, case.num_signals, case.independent, case.channels)
    problem = Problem.of(small)
    names = ("bmm", "autograd", "heads fused by hand")
    plain = next(p for p in providers(small, "cpu", True) if p.name in names).build(problem)
    with FlopCounterMode(display=False) as counter:
        plain.call()
    assert small.flops == counter.get_total_flops()


@pytest.mark.parametrize("case", LAYERS, ids=lambda c: c.name)
def test_flops_and_bytes_of_layers(case: LayerCase) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    problem = LayerProblem.of(case)
    running = layer_providers(case, True)[1].build(problem)
    with FlopCounterMode(display=False) as counter:
        running.call()
    assert case.flops == counter.get_total_flops()
    assert case.traffic == 4 * (3 * problem.x.numel() + 2 * problem.upstream.numel() + 3 * problem.weight.numel())


def value(number: float) -> Callable[[Any], Running]:
    """A provider that finds this number."""
    return lambda problem: Running(lambda: None, lambda: {"value": torch.tensor(number)}, units=2)


ABOUT: Row = {"suite": "step", "table": "step", "case": "c", "threads": 1, "axes": {"points": 4}}


def run(found: list[Provider]) -> tuple[dict[str, Row], str]:
    rows: list[Row] = []
    said = ""
    try:
        gate = equals({"value": torch.tensor(1.0, dtype=torch.float64)})
        measure(Clock(), rows.append, ABOUT, found, None, gate, rounds=3, flops=8, memory=False)
    except ParityError as error:
        said = str(error)
    return {row["provider"]: row for row in rows}, said


def test_only_what_is_right_gets_a_time() -> None:
    def broken(problem: Any) -> Running:
        raise ValueError("no such thing\nat all")

    rows, said = run([Provider(OURS, value(1.0)), Provider("wrong", value(1.001)), Provider("nan", value(math.nan)),
                      Provider("broken", broken), Provider("absent", value(1.0), "no_such_package"),
                      Provider("right", value(1.0))])  # fmt: skip
    timed = [name for name, row in rows.items() if "median_ms" in row]
    assert timed == [OURS, "right"]
    assert rows["wrong"]["refused"] == "value off by 1.0e-03, bound 1.0e-04"
    assert rows["nan"]["refused"] == "value off by inf, bound 1.0e-04" and rows["nan"]["error"] is None
    assert rows["broken"]["refused"] == "cannot run: ValueError: no such thing"
    assert rows["absent"]["not_run"] == "no_such_package is not installed"
    assert "wrong: " in said and "absent" not in said
    assert all(json.loads(json.dumps(row, allow_nan=False)) == row for row in rows.values())
    right = rows["right"]
    assert len(right["samples_ms"]) == 3 and right["p20_ms"] <= right["median_ms"] <= right["p80_ms"]


def test_without_ours_nothing_is_timed_and_all_is_recorded() -> None:
    rows, said = run([Provider(OURS, value(2.0)), Provider("right", value(1.0))])
    assert list(rows) == [OURS, "right"] and not any("median_ms" in row for row in rows.values())
    assert said.startswith(f"{OURS}: value off")


def test_curves_are_compared_until_roundings_grow() -> None:
    exact = [10.0 + i for i in range(21)]
    loop = [p + (2e-3 if i > 8 else 1e-6) for i, p in enumerate(exact)]
    late, early = ([p + 0.05 * (i > k) for i, p in enumerate(exact)] for k in (8, 3))
    assert curve_error(late, loop, exact) == 0.0
    assert curve_error(early, loop, exact) == pytest.approx(0.05)
    assert curve_error(exact, [p + 1.0 for p in exact], exact) == math.inf


def test_rows_are_on_the_disk_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Config:
        def getoption(self, name: str) -> Path:
            assert name == "--rows"
            return tmp_path / "rows.jsonl"

    keep = plugin.record.__wrapped__(type("Request", (), {"config": Config()}))  # type: ignore[attr-defined]
    keep(ABOUT | {"provider": OURS, "median_ms": 2.0, "p20_ms": 1.0, "p80_ms": 4.0})
    keep(ABOUT | {"provider": "other", "refused": "wrong"})
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["provider"] for line in lines] == [OURS, "other"]
    assert capsys.readouterr().err.splitlines() == [
        "* step    c: strainer_fast: 2 (1 to 4)",
        "  step    c: other: wrong",
    ]


def test_the_machine_is_named_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine()["commit"]
    monkeypatch.setenv("PATH", "")
    assert machine()["commit"] == "unknown"

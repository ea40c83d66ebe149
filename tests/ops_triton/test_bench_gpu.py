"""The GPU benchmark without its clock: what is wrong gets no time, measurement stands beside prediction."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from strainer_fast.benchmarks import gpu, gpu_layers, gpu_parts, gpu_tables, harness
from strainer_fast.benchmarks.cases import Case, Problem
from strainer_fast.benchmarks.gpu_parts import Bench, Provider, Stepping

# As few launches as can be: kernels have tests of their own.
ONE = Case("one", 9, 20, 2, channels=3)
HEADS = Case("heads", 8, 16, 2, num_signals=3)
STACK = Case("stack", 6, 16, 3, num_signals=2, independent=True)

measured: list[int] = []
"""How many calls the clock was given, each time."""


def clock(calls: Sequence[Callable[[], object]]) -> list[tuple[float, float, float]]:
    """Says what it likes."""
    measured.append(len(calls))
    return [(0.002 * (i + 1), 0.001, 0.004) for i in range(len(calls))]


BENCH = Bench("cuda" if torch.cuda.is_available() else "cpu", clock, lambda call, repeats: call)


def ways(case: Case, quick: bool) -> list[Provider]:
    """Those that need neither a compiler nor a CUDA graph."""
    return [way for way in gpu_parts.providers(case, quick=True) if "graph" not in way.name]


def wrong_in_fp32(problem: Problem, precision: str) -> dict[str, Tensor]:
    """Our losses and gradients, one of them a thousandth too large."""
    found = gpu.by_triton(problem, precision)
    return found | {"gradient 2": found["gradient 2"] * (1.001 if precision == "fp32" else 1.0)}


def step_off(problem: Problem, precision: str) -> Stepping:
    """Plain PyTorch whose steps after the first see other losses, as a stale CUDA graph's do."""
    right, count = gpu_parts.pytorch(problem, precision), iter(range(9))
    return Stepping(lambda: right.step() * (1.0 if next(count) == 0 else 1.01), right.gradients)


@pytest.mark.parametrize(("case", "precisions"), [(ONE, ("bf16", "tf32")), (STACK, ("fp32",))], ids=["one", "stack"])
def test_equality_on_chip_and_by_layers(
    case: Case, precisions: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    from strainer_fast.kernels import siren

    launched: list[str] = []
    for name in ("launch_network_step", "launch_network_forward"):
        launch = getattr(siren, name)
        monkeypatch.setattr(siren, name, lambda *a, f=launch, n=name, **k: (launched.append(n), f(*a, **k)))
    problem = gpu_parts.problem_on(case, BENCH.device)
    exact = gpu_parts.truth(problem)
    for precision in precisions:
        launched.clear()
        rows = gpu.equality(case, problem, exact, precision)
        assert [(r["what"], r["path"]) for r in rows] == [
            (what, path) for what in ("losses and gradients", "values") for path in ("on chip", "by layers")
        ]
        assert all(r["right"] and "refused" not in r for r in rows), rows
        assert launched == ["launch_network_step", "launch_network_forward"]  # once each: the others went by layers


def test_what_is_not_finite_or_of_another_shape_is_wrong() -> None:
    want = {"losses": torch.ones(2), "gradient 0": torch.ones(2, 3)}
    for got, where in (
        ({"losses": torch.ones(2) * torch.nan}, "losses"),
        ({"gradient 0": torch.ones(3, 2)}, "gradient 0"),
        ({"gradient 0": torch.tensor(torch.inf).expand(2, 3)}, "gradient 0"),
    ):
        row = harness.attempt(lambda got=got: harness.judge(want | got, want, "bf16"))
        assert row["refused"] == f"{where} off by inf, bound 6.2e-02"
        assert json.loads(json.dumps(row, allow_nan=False))["error"] is None


def test_wrong_gradients_get_no_time() -> None:
    """And in the same report, what is right does."""
    found = gpu.report([ONE], ["fp32", "fp16"], BENCH, ways=ways, losses=wrong_in_fp32, layers=(20, 16, ()),
                       fits=(4, (0, 0), 1, 8))  # fmt: skip
    refused = [(row["path"], row["refused"]) for row in found["equality"] if "refused" in row]
    assert refused == [(path, "gradient 2 off by 1.0e-03, bound 1.0e-04") for path in ("on chip", "by layers")]
    ours = [row for row in found["steps"] if row["provider"] == "strainer_fast"]
    assert [(row["precision"], "median_ms" in row) for row in ours] == [("fp16", True)]
    assert {row["precision"] for row in found["predictions"]} == {"fp16"}
    assert [(row["provider"], row["precision"], row["fits_per_s"]) for row in found["fits"]] == [
        ("strainer_fast", "fp32", 500.0), ("strainer_fast", "fp16", 250.0),
        ("PyTorch, autograd", "fp32", pytest.approx(1000 / 6))]  # fmt: skip
    assert not gpu.right(found)
    text = gpu_tables.markdown(json.loads(json.dumps(found, allow_nan=False)))
    assert "| one | fp32 | losses and gradients | on chip | 1.0e-03 of 1.0e-04 (gradient 2) | gradient 2 off by" in text
    assert "| one | **strainer_fast** | fp16 | 2 (1 to 4) |" in text
    if not torch.cuda.is_available():  # nothing can be recorded where Triton interprets
        assert "No measurement: cannot run: RuntimeError: capture: expected Triton's compiler" in text


def test_what_is_known_is_kept_before_each_part() -> None:
    """A run that is killed leaves whole parts behind, of which tables can be made."""
    kept: list[dict[str, Any]] = []

    def killed(case: Case, quick: bool) -> list[Provider]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.report([ONE], ["fp16"], BENCH, ways=killed, layers=(20, 16, ()),
                   keep=lambda found: kept.append(json.loads(json.dumps(found, allow_nan=False))))  # fmt: skip
    assert [len(found["equality"]) for found in kept] == [0, 4, 4]
    assert "| one | fp16 | values | on chip |" in gpu_tables.markdown(kept[-1])


def test_a_wrong_step_gets_no_time() -> None:
    problem = gpu_parts.problem_on(HEADS, BENCH.device)
    measured.clear()
    both = [*ways(HEADS, True), Provider("stale", step_off, "fp32")]
    rows = gpu.step_rows(HEADS, problem, gpu_parts.truth(problem), ["fp16"], both, BENCH)
    assert [(r["provider"], r["precision"]) for r in rows[:2]] == [
        ("strainer_fast", "fp16"), ("autograd + fused Adam", "fp32")]  # fmt: skip
    assert all(r["right"] and r["median_ms"] > 0 for r in rows[:-1])
    assert "losses of step" in rows[-1]["refused"] and "median_ms" not in rows[-1]
    assert measured == [len(rows) - 1]


def test_what_cannot_run_is_a_row_and_no_end() -> None:
    def broken(problem: Problem, precision: str) -> Stepping:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    problem = gpu_parts.problem_on(ONE, BENCH.device)
    rows = gpu.step_rows(ONE, problem, gpu_parts.truth(problem), [], [Provider("large", broken, "fp32")], BENCH)
    assert rows[0]["refused"] == "cannot run: OutOfMemoryError: CUDA out of memory."


def test_a_clock_that_fails_is_said() -> None:
    rows: list[dict[str, Any]] = [{}, {}]
    gpu_parts.timed(rows, [], Bench("cpu", lambda calls: [][0]))
    assert [row["refused"] for row in rows] == ["cannot run: IndexError: list index out of range"] * 2


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_layers(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = gpu_layers.layer_rows(precision, BENCH, 70, 48, (3, 30))
    assert [r["case"] for r in rows[::2]] == ["forward", "dX", "dW", "heads, 3 columns", "heads, 30 columns"]
    assert all("median_ms" in r for r in rows), rows
    part = gpu_layers.parts(precision, 70, 48, 3, BENCH.device)[2]
    part.want["dw"].mul_(1.1)
    monkeypatch.setattr(gpu_layers, "parts", lambda *sizes: [part])
    assert all("dw off by" in r["refused"] and "median_ms" not in r for r in
               gpu_layers.layer_rows(precision, BENCH, 70, 48, (3,)))  # fmt: skip


def test_the_clock_sums_up() -> None:
    assert harness.summary([5.0, 1.0, 3.0, 2.0, 4.0, 6.0]) == (3.5, 2.0, 5.0)


WITHOUT_A_GPU = """
import json, sys
from dataclasses import replace
import torch
torch.cuda.is_available = lambda: False  # also where there is one
from strainer_fast.benchmarks import gpu, gpu_parts
from strainer_fast.kernels.capture import capture
from strainer_fast.kernels.chip import CHIPS
code = gpu.main(["--out", sys.argv[1]])
clock = lambda calls: [(1e-3, 0.9e-3, 1.1e-3)] * len(calls)
bench = gpu_parts.Bench("meta", clock, lambda call, repeats: call)
found = []
for chip in (CHIPS["sm_90"], replace(CHIPS["sm_90"], arch=103)):
    with capture(chip):
        problem = gpu_parts.problem_on(gpu.CASES[0], "meta")
        found.append(gpu.prediction(gpu.CASES[0], problem, "fp16", bench, chip))
print(json.dumps([code, *found]))
"""


def test_prediction_beside_measurement_and_no_gpu(tmp_path: Path) -> None:
    """In a process of its own, for launches are recorded by Triton's compiler; the command's end is seen there too."""
    out = tmp_path / "gpu.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_GPU, str(out)], capture_output=True, text=True, check=False,
                          env=environment, cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    code, known, unknown = json.loads(done.stdout)
    assert code == 2 and not out.exists()
    assert done.stderr == "bench-gpu: expected a CUDA device to measure on, found none. `make bench` needs none.\n"

    kernels: list[dict[str, Any]] = known["kernels"]
    assert [k["kernel"] for k in kernels][-3:] == ["weight_gradient", "reduce", "adam"]
    assert all(k["median_ms"] == pytest.approx(1 / gpu.GRAPHED) and k["predicted_ms"] > 0 for k in kernels)
    assert known["predicted_ms"] == pytest.approx(sum(k["predicted_ms"] for k in kernels))
    assert (known["median_ms"], known["sum_ms"]) == (1.0, pytest.approx(len(kernels) / gpu.GRAPHED))
    text = gpu_tables.prediction(known)
    assert "| kernel | programs | us (p20 to p80) | predicted us | measured / predicted | bound |" in text
    assert f"| sum |  | {1e3 * known['sum_ms']:.3g} | {1e3 * known['predicted_ms']:.3g} |" in text
    assert "Predicted with the peaks of sm_90 in kernels/roofline.py: half 989" in text
    assert unknown["predicted_ms"] is None and all("predicted_ms" not in k for k in unknown["kernels"])
    assert gpu_tables.prediction(unknown).endswith("No prediction: kernels/roofline.py has no peaks of sm_103.")

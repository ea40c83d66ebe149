"""The benchmark harness: a wrong result gets no speed, FLOPs are counted right, tables say what rows say."""

import json
from pathlib import Path

import pytest
import torch

from strainer_fast.benchmarks import bench_fit, fits, report
from strainer_fast.benchmarks.cases import CASES, Case, Problem
from strainer_fast.benchmarks.fits import FitCase
from strainer_fast.benchmarks.harness import ParityError, check_parity, machine, row, truth_of
from strainer_fast.benchmarks.providers import compiled, providers

SMALL = [
    Case("one", 12, 8, 3),
    Case("heads", 12, 8, 3, num_signals=3, channels=2),
    Case("stack", 12, 8, 3, num_signals=3, independent=True),
]


@pytest.mark.parametrize("case", SMALL, ids=lambda c: c.name)
def test_providers_agree_with_float64(case: Case) -> None:
    problem = Problem.of(case)
    truth = truth_of(problem)
    for name, build in providers(case).items():
        if build is not compiled:  # needs a C++ compiler and half a minute
            check_parity(name, build(problem)(), truth)


def test_wrong_results_are_refused() -> None:
    problem = Problem.of(SMALL[1])
    truth = truth_of(problem)
    losses, gradients = providers(SMALL[1])["strainer_fast"](problem)()
    gradients[2] = gradients[2] * 1.001
    with pytest.raises(ParityError, match=r"gradient 2 off by 1\.0e-03"):
        check_parity("ours", (losses, gradients), truth)
    with pytest.raises(ParityError, match="losses off by nan"):
        check_parity("ours", (losses * torch.nan, gradients), truth)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[1], SMALL[2], CASES[1]], ids=lambda c: c.name)
def test_flops_are_those_of_the_products(case: Case) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    small = Case("", 12, case.width, case.num_layers, case.num_signals, case.independent, case.channels)
    problem = Problem.of(small)
    with FlopCounterMode(display=False) as counter:
        providers(small)["bmm + autograd" if small.independent else "autograd eager"](problem)()
    assert small.flops == counter.get_total_flops()


def test_rows_and_tables(tmp_path: Path) -> None:
    case = SMALL[0]
    ours = row(case, "strainer_fast", [0.002, 0.001, 0.004], 100.0, 1.5)
    other = row(case, "slow", [0.008] * 3, 100.0, None)
    assert (ours["median_ms"], ours["p20_ms"], ours["p80_ms"]) == (2.0, 1.0, 4.0)
    assert ours["sgemm_share"] == pytest.approx(case.flops / 0.002 / 1e9 / 100)
    result = {"benchmarks": [{"stats": {}, "extra_info": {"machine": machine(), "rows": [other, ours]}}]}
    table = report.markdown(report.rows_alone(result), "step")
    assert "| one | **strainer_fast** | 2 | 2.0 (1.0 to 4.0) | 1.00 |" in table
    assert "| one | slow | 2 | 8.0 (8.0 to 8.0) | 4.00 |" in table
    rows = [{"case": "f", "provider": p, "threads": 2, "fits_per_s": r, "lowest": r / 2, "highest": 2 * r}
            for p, r in (("loop", 2.0), ("strainer_fast", 50.0))]  # fmt: skip
    result["benchmarks"].append({"extra_info": {"machine": machine(), "suite": "fits", "rows": rows}})
    assert "| f | loop | 2 | 2.00 (1.00 to 4.00) | 25.0 |" in report.markdown(result, "fits")
    assert report.markdown(result, "sizes") == ""
    page = tmp_path / "page.md"
    begin, end = "<!-- step table: begin -->", "<!-- step table: end -->"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    for _ in range(2):
        report.update(page, result)
    assert page.read_text() == f"before\n{begin}\n{table}\n{end}\nafter\n"


def test_the_pages_show_the_committed_results() -> None:
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks" / "results" / "cpu.json").read_text())
    for suite, page in (("step", "README.md"), ("fits", "README.md"), ("sizes", "docs/native.md")):
        table = report.markdown(result, suite)
        assert table
        assert table in (root / page).read_text()


def test_ways_to_fit_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = FitCase("tiny", 8, 8, 3, 1, 20)
    losses = [build(case)(3) for build, _, _ in bench_fit.PROVIDERS.values()]
    for other in losses[1:]:
        torch.testing.assert_close(losses[0], other, rtol=1e-3, atol=0)
    bench_fit.check_gate(case)
    wrong = {**bench_fit.PROVIDERS, "wrong": (lambda case: lambda num: fits.ours(case)(num) * 1.01, 1, 1)}
    monkeypatch.setattr(bench_fit, "PROVIDERS", wrong)
    with pytest.raises(ParityError, match="wrong: PSNR after 100 steps off by"):
        bench_fit.check_gate(case)


def test_processes_of_loops() -> None:
    pair = fits.LoopProcesses(FitCase("tiny", 8, 8, 3, 1, 2), 2)
    try:
        assert pair.seconds(1) > 0
    finally:
        pair.close()

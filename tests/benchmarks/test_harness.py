"""The benchmark harness: a wrong result gets no speed, FLOPs are counted right, tables say what rows say."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import report
from benchmarks.cases import CASES, Case, Problem
from benchmarks.harness import ParityError, check_parity, machine, row, truth_of
from benchmarks.providers import compiled, providers

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
    table = report.markdown(report.rows_alone(result))
    assert "| one | **strainer_fast** | 2 | 2.0 (1.0 to 4.0) | 1.00 |" in table
    assert "| one | slow | 2 | 8.0 (8.0 to 8.0) | 4.00 |" in table
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.update(page, table)
    report.update(page, table)
    assert page.read_text() == f"before\n{report.BEGIN}\n{table}\n{report.END}\nafter\n"


def test_readme_shows_the_committed_results() -> None:
    root = Path(__file__).parents[2]
    result = json.loads((root / "benchmarks" / "results" / "cpu.json").read_text())
    assert report.markdown(result) in (root / "README.md").read_text()

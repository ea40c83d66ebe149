"""Training steps (forward, loss, backward), ours against the peers, in one interleaved run."""

from __future__ import annotations

from typing import Any

import pytest

from strainer_fast.benchmarks.cases import CASES, Case, Problem, named, truth_of
from strainer_fast.benchmarks.harness import Record, equals, measure
from strainer_fast.benchmarks.step_peers import providers

ROUNDS = {"step": 11, "sizes": 5}
QUICK_ROUNDS = 5


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[pytest.mark.quick] * c.quick) for c in CASES])
def test_step(benchmark: Any, case: Case, device: str, quick: bool, record: Record) -> None:
    """Every provider against float64, then all in turn."""
    problem = Problem.of(case, device)
    about = {"suite": "step", "table": case.table, "case": case.name, "threads": case.threads, "axes": case.axes}
    benchmark.group = case.name
    measure(
        benchmark,
        record,
        about,
        providers(case, device, quick),
        problem,
        equals(named(truth_of(problem))),
        rounds=QUICK_ROUNDS if quick else ROUNDS[case.table],
        device=device,
        flops=case.flops,
    )

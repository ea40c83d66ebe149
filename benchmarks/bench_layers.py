"""Single layers, forward and backward: latency and throughput over their size."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from strainer_fast.benchmarks.harness import Record, equals, measure
from strainer_fast.benchmarks.layer_peers import LAYER_CASES, LayerCase, LayerProblem, layer_providers

ROUNDS, QUICK_ROUNDS = 15, 7


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[pytest.mark.quick] * c.quick) for c in LAYER_CASES])
def test_layer(benchmark: Any, case: LayerCase, device: str, quick: bool, record: Record) -> None:
    """Every provider against float64, then all in turn."""
    torch.compiler.reset()  # its limit of compilations is meant for one case
    problem = LayerProblem.of(case, device)
    benchmark.group = case.name
    measure(
        benchmark,
        record,
        {"suite": "layers", "table": case.kind, "case": case.name, "threads": case.threads, "axes": case.axes},
        layer_providers(case, quick),
        problem,
        equals(problem.truth()),
        rounds=QUICK_ROUNDS if quick else ROUNDS,
        device=device,
        flops=case.flops,
        traffic=case.traffic,
    )

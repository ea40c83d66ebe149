"""A training step, ours against the others, interleaved round by round.

pytest-benchmark times ours; before each of its rounds every other provider runs once, so that a change of the machine's
mood hits all of them. All rows are in the JSON file's extra_info; `python -m benchmarks.report` makes tables of them.
"""

from __future__ import annotations

import statistics
import time
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, Case, Problem
from benchmarks.harness import check_parity, machine, peak_megabytes, row, sgemm, truth_of
from benchmarks.jax_peer import JaxPeer
from benchmarks.providers import providers

ROUNDS = {"step": 11, "sizes": 5}


def start_jax(problem: Problem) -> JaxPeer:
    """The same step in JAX."""
    p = problem
    return JaxPeer(p.points.numpy(), p.values.numpy(), [t.detach().numpy() for t in p.parameters], p.omegas)


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[pytest.mark.quick] * c.quick) for c in CASES])
def test_step(benchmark: Any, case: Case) -> None:
    """Checks every provider against float64, then measures them in turn."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        problem = Problem.of(case)
        truth = truth_of(problem)
        steps, warm_up = {}, {}
        for name, build in providers(case).items():
            begin = time.perf_counter()
            step = build(problem)
            check_parity(name, step(), truth)
            warm_up[name] = time.perf_counter() - begin
            step()
            steps[name] = step
        # XLA takes all cores.
        with_jax = case.suite == "step" and case.threads > 1 and find_spec("jax") is not None
        jax_peer = start_jax(problem) if with_jax else None
        if jax_peer is not None:
            losses, *gradients = (torch.from_numpy(r) for r in jax_peer.results)
            check_parity("JAX jit", (losses, gradients), truth)
        memory: dict[str, float | None] = {name: peak_megabytes(step) for name, step in steps.items()}
        rate = sgemm()
        own = steps.pop("strainer_fast")
        seconds: dict[str, list[float]] = {name: [] for name in ("strainer_fast", *steps)}
        rates: list[float] = []
        if jax_peer is not None:
            seconds["JAX jit"], memory["JAX jit"], warm_up["JAX jit"] = [], None, 0.0

        def others() -> None:
            rates.append(rate())
            if jax_peer is not None:
                seconds["JAX jit"].append(jax_peer.step())
            for name, step in steps.items():
                begin = time.perf_counter()
                step()
                seconds[name].append(time.perf_counter() - begin)

        benchmark.group = case.name
        benchmark.pedantic(own, setup=others, rounds=ROUNDS[case.suite], iterations=1)
        seconds["strainer_fast"] = list(benchmark.stats.stats.data)
        best = statistics.median(rates)
        rows = [
            row(case, name, times, best, memory[name]) | {"warm_up_s": warm_up[name]} for name, times in seconds.items()
        ]
        benchmark.extra_info.update(machine=machine(), suite=case.suite, rows=rows)
        if jax_peer is not None:
            jax_peer.close()
    finally:
        torch.set_num_threads(threads)

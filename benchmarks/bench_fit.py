"""Fits per second of small networks, ours against the others, interleaved round by round; see bench_step.py."""

from __future__ import annotations

import dataclasses
import statistics
import time
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch

from benchmarks.fits import FIT_CASES, Fit, FitCase, LoopProcesses, ours, python_loop, stacked
from benchmarks.harness import ParityError, machine

ROUNDS = 5
GATE_STEPS = 100
"""After more steps any two float32 implementations drift apart in single signals."""
GATE_DB = 0.01

PROVIDERS: dict[str, tuple[Any, int, int]] = {  # how, threads, fits in a round (0: a stack)
    "strainer_fast": (ours, 2, 0),
    "Python loop": (python_loop, 1, 2),
    "Python loop, 2 threads": (python_loop, 2, 2),
    "bmm + autograd": (lambda case: stacked(case, "bmm"), 2, 0),
    "torch.func.vmap": (lambda case: stacked(case, "vmap"), 2, 0),
    "bmm, backward by hand": (lambda case: stacked(case, "tiled"), 2, 0),
}


def check_gate(case: FitCase) -> None:
    """Every provider's PSNR after GATE_STEPS, signal by signal, is the Python loop's."""
    short = dataclasses.replace(case, steps=GATE_STEPS)
    truth = -10 * python_loop(short)(4).log10()
    for name, (build, _, _) in PROVIDERS.items():
        off = float((-10 * build(short)(4).log10() - truth).abs().max())
        if not off <= GATE_DB:
            raise ParityError(f"{name}: PSNR after {GATE_STEPS} steps off by {off:.3f} dB; no speed is reported")


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name) for c in FIT_CASES])
def test_fits_per_second(benchmark: Any, case: FitCase) -> None:
    """Checks every provider, then measures them in turn."""
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        check_gate(case)
        runs: dict[str, Fit] = {name: build(case) for name, (build, _, _) in PROVIDERS.items()}
        pair = stack.enter_context(closing(LoopProcesses(case, 2)))
        rates: dict[str, list[float]] = {name: [] for name in (*PROVIDERS, "Python loop, 2 processes")}

        def others() -> None:
            fits = PROVIDERS["Python loop"][2]
            rates["Python loop, 2 processes"].append(2 * fits / pair.seconds(fits))
            for name, (_, count, fits) in list(PROVIDERS.items())[1:]:
                torch.set_num_threads(count)
                fits = fits or case.stack
                begin = time.perf_counter()
                runs[name](fits)
                rates[name].append(fits / (time.perf_counter() - begin))
            torch.set_num_threads(2)

        fits = 2 * case.stack
        benchmark.group = case.name
        benchmark.pedantic(lambda: runs["strainer_fast"](fits), setup=others, rounds=ROUNDS, iterations=1)
        rates["strainer_fast"] = [fits / seconds for seconds in benchmark.stats.stats.data]
        rows = [
            {
                "case": case.name,
                "provider": name,
                "threads": PROVIDERS[name][1] if name in PROVIDERS else 2,
                "fits_per_s": statistics.median(each),
                "lowest": min(each),
                "highest": max(each),
            }
            for name, each in rates.items()
        ]
        benchmark.extra_info.update(machine=machine(), suite="fits", rows=rows)

"""Interleaved measurement with a parity gate: a wrong result gets no speed."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case, Problem
from benchmarks.providers import Result, Step
from strainer_fast import __version__
from strainer_fast.kernels import cpu as native
from strainer_fast.ops import choose, losses_and_gradients

TOLERANCE = 1e-4
"""Largest relative error, by norm, of losses and of each gradient against autograd in float64."""


CHUNK = 2**15
"""Points that the truth is computed on at once."""


class ParityError(AssertionError):
    """A provider computes something else."""


def check_parity(name: str, result: Result, truth: Result) -> None:
    """Raise ParityError unless losses and every gradient agree with the truth."""
    for i, (got, want) in enumerate(zip([result[0], *result[1]], [truth[0], *truth[1]], strict=True)):
        error = float((got.double() - want).norm() / want.norm())
        if not error <= TOLERANCE:
            what = "losses" if i == 0 else f"gradient {i - 1}"
            raise ParityError(f"{name}: {what} off by {error:.1e} relative; no speed is reported")


def truth_of(problem: Problem) -> Result:
    """Autograd in float64, a part of the points or one network at a time, to bound the memory."""

    def double(t: Tensor) -> Tensor:
        return t.detach().double()

    independent = problem.parameters[0].ndim == 3
    parts = []
    if not independent:
        parameters = [double(p).requires_grad_() for p in problem.parameters]
        chunks = zip(problem.points.split(CHUNK), problem.values.split(CHUNK, dim=1), strict=True)
        for points, values in chunks:
            share = points.shape[0] / problem.points.shape[0]
            losses, gradients = losses_and_gradients(
                "torch", double(points), double(values), parameters, problem.omegas, True
            )
            parts.append((losses * share, [g * share for g in gradients]))
        summed = [torch.stack(g).sum(0) for g in zip(*(g for _, g in parts), strict=True)]
        return torch.stack([losses for losses, _ in parts]).sum(0), summed
    for n in range(problem.values.shape[0]):
        parameters = [double(p[n : n + 1]).requires_grad_() for p in problem.parameters]
        own = double(problem.values[n : n + 1])
        parts.append(losses_and_gradients("torch", double(problem.points), own, parameters, problem.omegas, True))
    gradients = [torch.cat(g) for g in zip(*(g for _, g in parts), strict=True)]
    return torch.cat([losses for losses, _ in parts]), gradients


def sgemm() -> Callable[[], float]:
    """The machine's own rate: a 2048^3 float32 product, in GFLOP/s per call."""
    a, b, c = (torch.randn(2048, 2048) for _ in range(3))

    def run() -> float:
        begin = time.perf_counter()
        torch.mm(a, b, out=c)
        return 2 * 2048**3 / (time.perf_counter() - begin) / 1e9

    return run


def peak_megabytes(step: Step) -> float | None:
    """Memory of one call above what was there, where Linux tells."""
    refs = Path("/proc/self/clear_refs")
    if not refs.exists():
        return None
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    refs.write_text("5")
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    found = re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def machine() -> dict[str, str]:
    """What every row must say about where it was measured."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        cpu = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[0]
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "cpu": cpu,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "strainer_fast": __version__,
        "commit": git.stdout.strip() or "unknown",
        "engine": f"{choose('auto', torch.device('cpu')).name} {native.level() or ''}".strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def row(case: Case, name: str, seconds: list[float], sgemm_rate: float, memory: float | None) -> dict[str, Any]:
    """One line of the results: medians and spread, never a best time alone."""
    ordered = sorted(seconds)

    def quantile(q: float) -> float:
        return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]

    median = statistics.median(ordered)
    rate = case.flops / median / 1e9
    return {
        "case": case.name,
        "provider": name,
        "threads": case.threads,
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * quantile(0.2),
        "p80_ms": 1e3 * quantile(0.8),
        "gflops": rate,
        "sgemm_share": rate / sgemm_rate,
        "sgemm_gflops": sgemm_rate,
        "peak_mb": memory,
        "rounds": len(seconds),
    }

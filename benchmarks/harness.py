"""Every suite measures by this: a gate first (a wrong result gets no time), then interleaved rounds, then a row."""

from __future__ import annotations

import ctypes
import gc
import math
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from strainer_fast import __version__
from strainer_fast.kernels import cpu as native
from strainer_fast.ops import choose, choose_device

OURS = "strainer_fast"
"""The provider that others are compared with; names of its variants begin with it."""

BOUNDS = {"fp32": 1e-4, "tf32x3": 1e-4, "tf32": 16 * 2.0**-11, "fp16": 16 * 2.0**-11, "bf16": 16 * 2.0**-8}
"""Largest relative error, by norm, against float64; of those that round, 16 times what rounding an operand costs."""

SAMPLE, MOST_REPEATS, SLOW = 3e-3, 200, 2.0
"""In a round a call repeats until it takes about SAMPLE seconds, at most so often; what took SLOW seconds does not."""

Call = Callable[[], object]
Row = dict[str, Any]
Rows = list[Row]
Named = dict[str, Tensor]
"""What the gate looks at: losses, gradients, values."""
Gate = Callable[[Named], Row]
"""From results to "right", "error", "bound" and "where" the error is."""
Seconds = tuple[float, float, float]
"""Median, p20, p80."""
Record = Callable[[Row], None]
"""Keeps a row at once, so that a run that is killed leaves what it had."""


@dataclass(frozen=True)
class Running:
    """A provider at work on a problem.

    Args:
        call: what is timed.
        results: runs it and gives what the gate looks at.
        seconds: runs it in another process and gives the time it took there; None where `call` is timed here.
        close: ends that process.
        units: how many of what rows count (steps, images, fits) a call does.
    """

    call: Call
    results: Callable[[], Named]
    seconds: Callable[[], float] | None = None
    close: Callable[[], None] = lambda: None
    units: int = 1


@dataclass(frozen=True)
class Provider:
    """A way to do the work of a case: ours or a peer.

    Args:
        name: unique in its case.
        build: from a suite's problem to the provider at work.
        package: that it needs beside PyTorch; where it is not installed the row says so.
        gate: from the problem to a gate of its own, for a peer that cannot give what the others do.
    """

    name: str
    build: Callable[[Any], Running]
    package: str | None = None
    gate: Callable[[Any], Gate] | None = None


class ParityError(AssertionError):
    """A provider computes something else."""


def relative(got: Tensor, want: Tensor) -> float:
    """Error by norm; infinity for NaN and other shapes."""
    if got.shape != want.shape:
        return math.inf
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    return error if math.isfinite(error) else math.inf


def judge(got: Named, want: Named, precision: str = "fp32") -> Row:
    """The worst of all errors, where it is, and whether it is within the bound."""
    errors = {name: relative(got[name], tensor) for name, tensor in want.items()}
    where = max(errors, key=lambda name: errors[name])
    error, bound = errors[where], BOUNDS[precision]
    return {"right": error <= bound, "error": error, "bound": bound, "where": where}


def equals(truth: Named) -> Gate:
    """The gate of results that have to agree with others, in float64."""
    return lambda got: judge(got, truth)


def attempt(run: Callable[[], Row]) -> Row:
    """What `run` gives and how long it took, compiling included; for whatever fails, a row that says so."""
    begin = time.perf_counter()
    try:
        found = run()
    except Exception as error:  # the other rows are worth having whatever it is
        first = (str(error).strip().splitlines() or [""])[0]
        return {"right": False, "refused": f"cannot run: {type(error).__name__}: {first}"}
    found["first_s"] = time.perf_counter() - begin
    if found.get("right", True):
        return found
    found["refused"] = f"{found['where']} off by {found['error']:.1e}, bound {found['bound']:.1e}"
    if not math.isfinite(found["error"]):  # which JSON has no word for
        found["error"] = None
    return found


def summary(samples: Sequence[float]) -> Seconds:
    """Median, p20 and p80."""
    ordered = sorted(samples)
    low, high = (ordered[round(q * (len(ordered) - 1))] for q in (0.2, 0.8))
    return statistics.median(ordered), low, high


def missing(package: str | None) -> str | None:
    """Why a peer cannot run; None if its package is here."""
    if package is None or find_spec(package) is not None:
        return None
    return f"{package} is not installed"


def measure(
    benchmark: Any,
    record: Record,
    about: Row,
    providers: Sequence[Provider],
    problem: Any,
    gate: Gate,
    *,
    rounds: int,
    device: str = "cpu",
    flops: int | None = None,
    traffic: int | None = None,
    memory: bool = True,
    more: Callable[[str], Row] = lambda name: {},
) -> Rows:
    """Check every provider against the truth, time those that pass in turn, and record a row for each.

    Args:
        benchmark: pytest-benchmark's fixture; it times ours, and before each of its rounds every peer runs once, so
            that a change of the machine's mood meets all of them.
        about: what the rows have in common: suite, case, threads, and in "x" what plots have on their axis.
        providers: ours first.
        gate: from what a provider gives to whether it is right; see `equals`.
        flops, traffic: of a call, in operations and bytes; see benchmarks/README.md for what counts.
        memory: whether a call's peak is measured, which takes one more of it.
        more: what else a row of that provider has, asked after the last round.

    Raises ParityError after all rows are recorded, if any provider that could run was wrong.
    """
    rows: Rows = []
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(about["threads"])
        going: dict[str, Running] = {}
        for provider in providers:
            row = about | {"provider": provider.name, "device": device, "flops": flops, "bytes": traffic}
            rows.append(row)
            absent = missing(provider.package)
            if absent is not None:
                row["not_run"] = absent
                continue

            def first(provider: Provider = provider) -> Row:
                running = provider.build(problem)
                stack.callback(running.close)
                own = gate if provider.gate is None else provider.gate(problem)
                return own(running.results()) | {"running": running}

            row |= attempt(first)
            running = row.pop("running", None)
            if not row.pop("right"):
                continue
            going[provider.name] = running
            if memory and running.seconds is None:
                row["peak_mb"] = peak_megabytes(running.call, device)
        first_s = {row["provider"]: row["first_s"] for row in rows if row["provider"] in going}
        samples = interleaved(benchmark, going, first_s, rounds, device) if OURS in going else {}
        rate = statistics.median(samples.pop("sgemm", [math.nan]))
        for row in rows:
            if row["provider"] in samples:
                units = going[row["provider"]].units
                row |= timing([s / units for s in samples[row["provider"]]], rate) | more(row["provider"])
            record(row)
    refused = [f"{row['provider']}: {row['refused']}" for row in rows if "refused" in row]
    if refused:
        raise ParityError("; ".join(refused))
    return rows


def timing(samples: Sequence[float], sgemm_gflops: float) -> Row:
    """Medians and spread in milliseconds, never a best time alone; and what the machine could do at that time."""
    median, low, high = summary(samples)
    return {
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * low,
        "p80_ms": 1e3 * high,
        "samples_ms": [float(f"{1e3 * s:.4g}") for s in samples],
        "sgemm_gflops": sgemm_gflops,
    }


def interleaved(
    benchmark: Any, going: Mapping[str, Running], first: Mapping[str, float], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of a call of each, round by round, and the machine's rate of products in each round as "sgemm"."""

    def once(call: Call, repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            call()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begin

    repeats = {}
    for name, running in going.items():
        if running.seconds is None:
            seconds = math.inf if first[name] > SLOW else min(once(running.call, 1) for _ in range(2))
            repeats[name] = max(1, min(MOST_REPEATS, math.ceil(SAMPLE / max(seconds, 1e-6))))
    samples: dict[str, list[float]] = {"sgemm": [], **{name: [] for name in going}}
    rate = sgemm(device)

    def others() -> None:
        samples["sgemm"].append(rate())
        for name, running in going.items():
            if running.seconds is not None:
                samples[name].append(running.seconds())
            elif name != OURS:
                samples[name].append(once(running.call, repeats[name]) / repeats[name])

    own = going[OURS]
    benchmark.pedantic(lambda: once(own.call, repeats[OURS]), setup=others, rounds=rounds, iterations=1)
    samples[OURS] = [seconds / repeats[OURS] for seconds in benchmark.stats.stats.data]
    return samples


def sgemm(device: str = "cpu") -> Callable[[], float]:
    """The machine's own rate: a large float32 product, in GFLOP/s per call."""
    size = 2048 if device == "cpu" else 8192
    a, b, c = (torch.randn(size, size, device=device) for _ in range(3))

    def run() -> float:
        begin = time.perf_counter()
        torch.mm(a, b, out=c)
        if device == "cuda":
            torch.cuda.synchronize()
        return 2 * size**3 / (time.perf_counter() - begin) / 1e9

    return run


def peak_megabytes(call: Call, device: str = "cpu") -> float | None:
    """Memory of one call above what was there, where the system tells."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    refs = Path("/proc/self/clear_refs")
    if not refs.exists():
        return None
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    refs.write_text("5")
    resident = _status("VmRSS")
    call()
    return (_status("VmHWM") - resident) / 1024


def _status(name: str) -> int:
    found = re.search(name + r":\s+(\d+)", Path("/proc/self/status").read_text())
    return int(found[1]) if found else 0


def machine(device: str = "cpu") -> dict[str, str]:
    """What every row must say about where it was measured."""
    cpu = platform.processor() or platform.machine()
    with suppress(OSError):
        cpu = re.findall(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())[0]
    commit = ""
    with suppress(OSError):  # no git here
        asked = ["git", "describe", "--always", "--dirty"]
        folder = Path(__file__).resolve().parent
        commit = subprocess.run(asked, cwd=folder, capture_output=True, text=True, check=False).stdout.strip()
    where = choose_device(device)
    found = {
        "cpu": cpu,
        "cores": str(torch.get_num_threads()),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "strainer_fast": __version__,
        "commit": commit or "unknown",
        "engine": f"{choose('auto', where).name} {(native.level() or '') if device == 'cpu' else ''}".strip(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
    return found if device == "cpu" else found | {"gpu": torch.cuda.get_device_name()}

"""Stages 7 and 8: rendering, and what profilers say of a step."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch

import strainer_fast as sf
from strainer_fast.benchmarks.first_light.fitting import TINY, scan, seconds_of
from strainer_fast.benchmarks.gpu_parts import cuda_clock
from strainer_fast.fitting.rendering import render
from strainer_fast.ops.dispatch import PRECISIONS

if TYPE_CHECKING:
    from strainer_fast.benchmarks.first_light.stages import Run

NCU_METRICS = (
    "gpu__time_duration.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread",
)

NCU_FIT = """
import strainer_fast as sf
signal = sf.signals.samples("brain-mri", "test")[2:3]
sf.fit(signal, "siren", sf.recipe("paper", steps=1), device="cuda")
"""


def rendering(run: Run) -> None:
    """Values at a million points in every precision, and whole images of 3840x2160."""
    network = sf.Siren(2, 16, 3, 3) if run.small else sf.Siren(2, 256, 6, 3)
    network = network.to("cuda")
    count, size = (2**8, (8, 12)) if run.small else (2**20, (2160, 3840))
    points = torch.rand(count, 2, device="cuda") * 2 - 1
    exact = network.values(points[:4096], implementation="torch")

    def values(precision: str) -> None:
        begin = time.perf_counter()
        found = network.values(points, precision=precision)
        error = float((found[:4096] - exact).abs().max())
        first = time.perf_counter() - begin
        median, low, high = cuda_clock([lambda: network.values(points, precision=precision)], 5)[0]
        run.log.row(
            what="values",
            precision=precision,
            points=count,
            us=1e6 * median,
            p20_us=1e6 * low,
            p80_us=1e6 * high,
            first_s=first,
            most_off=error,
        )

    def image(**how: Any) -> None:
        times = []
        for _ in range(2):
            begin = time.perf_counter()
            render(network, size, **how)
            times.append(time.perf_counter() - begin)
        run.log.row(
            what="render",
            size=list(size),
            **how,
            seconds=times[1],
            first_s=times[0],
            megapixels_per_s=size[0] * size[1] / times[1] / 1e6,
        )

    items: list[tuple[dict[str, Any], Callable[[], object]]] = []
    precisions = PRECISIONS[:2] if run.small else PRECISIONS
    items += [({"what": "values", "precision": p}, partial(values, p)) for p in precisions]
    items.append(({"what": "render"}, image))
    if "precision" in signature(render).parameters:
        items += [({"what": "render", "precision": p}, partial(image, precision=p)) for p in precisions]
    run.log.each(items)


def profiles(run: Run) -> None:
    """Where the GPU's time goes in `fast` and `paper`; then what ncu says of the first kernels of a step."""
    items: list[tuple[dict[str, Any], Callable[[], object]]] = [
        ({"what": "profile", "recipe": name}, partial(_profile, run, name, steps))
        for name, steps in (("fast", 3 if run.small else 30), ("paper", 3 if run.small else 100))
    ]
    items.append(({"what": "ncu"}, partial(_ncu, run)))
    run.log.each(items)


def _profile(run: Run, name: str, steps: int) -> None:
    from torch.profiler import ProfilerActivity, profile

    signals, architecture = scan(run.small), TINY if run.small else None
    seconds_of(signals, "siren", sf.recipe(name, steps=5), architecture=architecture)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (not run.small)
    with profile(activities=activities) as seen:
        seconds, _ = seconds_of(signals, "siren", sf.recipe(name, steps=steps), architecture=architecture)
    events = seen.key_averages()
    kernels = sorted((e for e in events if e.self_device_time_total > 0), key=lambda e: -e.self_device_time_total)
    busy = sum(e.self_device_time_total for e in kernels) * 1e-6
    run.log.row(
        what="profile",
        recipe=name,
        steps=steps,
        seconds=seconds,
        busy_s=busy,
        busy_us_a_step=1e6 * busy / steps,
        launches_a_step=sum(e.count for e in kernels) / steps,
        dearest=[[e.key[:60], e.count, e.self_device_time_total / max(e.count, 1)] for e in kernels[:8]],
    )
    order = "self_cpu_time_total" if run.small else "self_cuda_time_total"
    (run.out / f"profile-{name}.txt").write_text(events.table(sort_by=order, row_limit=40))


def _ncu(run: Run) -> None:
    """Nsight Compute's numbers of the launches of one step that take longest."""
    tool = shutil.which("ncu")
    if tool is None:
        run.log.row(what="ncu", not_run="ncu is not installed here")
        return
    command = [
        tool,
        "--csv",
        "--target-processes",
        "all",
        "--metrics",
        ",".join(NCU_METRICS),
        "--kernel-name-base",
        "function",
        "--launch-count",
        "60",
        sys.executable,
        "-c",
        NCU_FIT,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(5, run.log.left()), check=False)
    (run.out / "ncu.csv").write_text(done.stdout[-2_000_000:] + done.stderr[-20_000:])
    kernels = _ncu_rows(done.stdout)
    if not kernels:
        said = (done.stdout + done.stderr).strip().splitlines()
        run.log.row(what="ncu", not_run=" ".join(said[-3:])[:400] or f"ncu ended with code {done.returncode}")
    for kernel in kernels[:3]:
        run.log.row(what="ncu", **kernel)


def _ncu_rows(text: str) -> list[dict[str, Any]]:
    """From its CSV, one launch of each kernel, the dearest first."""
    import csv

    lines = [line for line in text.splitlines() if line.startswith('"')]
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines):
        found = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
        value = row["Metric Value"].replace(",", "")
        found[row["Metric Name"].split(".")[0]] = float(value) if value.replace(".", "").isdigit() else value
    longest: dict[str, dict[str, Any]] = {}
    for launch in sorted(launches.values(), key=lambda f: -float(f.get("gpu__time_duration", 0))):
        longest.setdefault(launch["kernel"], launch)
    return list(longest.values())

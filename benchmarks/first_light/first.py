"""Stages 1 and 2: what is here, and whether every kernel is right."""

from __future__ import annotations

import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import strainer_fast as sf
from strainer_fast.benchmarks import gpu, gpu_layers, gpu_parts
from strainer_fast.benchmarks.cases import Case
from strainer_fast.benchmarks.gpu_tables import machine
from strainer_fast.benchmarks.harness import Rows, judge
from strainer_fast.ops.dispatch import PRECISIONS

if TYPE_CHECKING:
    import pytest

    from strainer_fast.benchmarks.first_light.rows import Log
    from strainer_fast.benchmarks.first_light.stages import Run

ROOT = Path(__file__).resolve().parents[2]

TINY = (
    Case("8x8, 3x32", 8, 32, 3, channels=3),
    Case("3 networks 2x16, 6x6", 6, 16, 3, num_signals=3, independent=True),
)
"""Of a rehearsal: one of each kind."""


def environment(run: Run) -> None:
    """Versions, chip, peaks of this very card; one kernel compiled, launched and right."""
    log = run.log
    with log.attempt(what="environment"):
        import numpy

        cache = Path(os.environ.get("TRITON_CACHE_DIR", "~/.triton/cache")).expanduser()
        log.row(
            what="environment",
            **machine("cuda"),
            numpy=numpy.__version__,
            gcc=shutil.which("gcc"),
            executable=sys.executable,
            cache_entries=len(list(cache.glob("*"))),
            explain=sf.ops.explain("auto", "cuda"),
        )
    with log.attempt(what="one kernel"):
        from strainer_fast.kernels.trig import launch_sincos

        x = torch.linspace(-30, 30, 4096, device="cuda")
        sine, cosine = torch.empty_like(x), torch.empty_like(x)
        launch_sincos(x, sine, cosine)
        error = float((sine.double() - x.double().sin()).abs().max())
        log.row(what="one kernel", error=error, right=error < 2e-7)
    with log.attempt(what="peaks"):
        size, count = (64, 2**10) if run.small else (8192, 2**30)
        a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
        source = torch.empty(count, dtype=torch.uint8, device="cuda")
        into = torch.empty_like(source)
        (product, *_), (copy, *_) = gpu_parts.cuda_clock([lambda: a @ b, lambda: into.copy_(source)], 3)
        log.row(what="peaks", half_tflops=2 * size**3 / product / 1e12, copy_tb_s=2 * count / copy / 1e12)


def equality(run: Run) -> None:
    """Every kernel in every precision against float64, each process its share: whole steps, layers, then the tests."""
    log = run.log
    items = [
        ({"what": "equality", "case": case.name, "precision": precision}, partial(_case, log, case, precision))
        for case in (TINY if run.small else gpu.CASES)
        for precision in (PRECISIONS[:2] if run.small else PRECISIONS)
    ]
    for precision in PRECISIONS[:1] if run.small else PRECISIONS:
        sizes = (64, 32, 3) if run.small else (*gpu.LAYERS[:2], 3)
        items.append(({"what": "layers", "precision": precision}, partial(_layers, log, precision, sizes)))
    log.each(items[run.part :: run.parts])
    if not run.small:
        _tests(run)


def _case(log: Log, case: Case, precision: str) -> None:
    problem = gpu_parts.problem_on(case, "cuda")
    exact = gpu_parts.truth(problem)
    rows: Rows = gpu.equality(case, problem, exact, precision)
    for row in rows:
        log.row(**{**row, "what": "equality", "of": row["what"]})


def _layers(log: Log, precision: str, sizes: tuple[int, int, int]) -> None:
    for part in gpu_layers.parts(precision, *sizes, "cuda"):
        with log.attempt(what="equality", case=part.name, precision=precision):
            part.launch()
            log.row(
                what="equality",
                case=part.name,
                precision=precision,
                of="a layer alone",
                **judge(part.results(), part.want, precision),
            )


class Share:
    """A pytest plugin: this process's share of the tests, failures as rows, an end when time is over."""

    def __init__(self, run: Run) -> None:
        self.run, self.counts = run, {"passed": 0, "failed": 0, "skipped": 0, "left_out": 0}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = items[self.run.part :: self.run.parts]

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        import pytest

        if self.run.log.left() < 2:
            self.counts["left_out"] += 1
            pytest.skip("no time is left")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.outcome] += 1
        if report.failed:
            lines = str(report.longrepr).strip().splitlines()
            said = [line.removeprefix("E").strip() for line in lines if line.startswith("E ")]
            self.run.log.row(
                what="test",
                name=report.nodeid,
                failed=" ".join(said)[:600] or lines[-1],
                trace=lines[-4:],
                took_s=report.duration,
            )


def _tests(run: Run) -> None:
    """tests/kernels as they are, compiled, by the share of this process."""
    import pytest

    os.chdir(ROOT)
    plugin = Share(run)
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "-x" if run.small else "--maxfail=40"]
    code: Any = pytest.main([*options, "tests/kernels"], plugins=[plugin])
    run.log.row(what="tests", of="tests/kernels", code=int(code), part=run.part, **plugin.counts)

"""Compiles the kernels for GPUs that need not be here, and reports what they take: `make aot` writes docs/aot.md.

python -m strainer_fast.kernels.aot --chip sm_90 --precision fp16 [--only step] [--markdown docs/aot.md]
"""

import argparse
import contextlib
import datetime
import fnmatch
import importlib
import io
import json
import multiprocessing
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import triton

from .capture import Launch, Specialisation, capture
from .cases import CASES, Case
from .chip import CHIPS, Chip
from .mm import PRECISIONS
from .roofline import assumptions, summary
from .sass import Report, read_amd, read_nvidia

OLDEST = (3, 3)
"""Of Triton: older ones take other descriptions of a kernel."""


@dataclass(frozen=True)
class Job:
    """A kernel to compile, and every case that launches it."""

    specialisation: Specialisation
    launch: Launch  # one of those
    chip: Chip
    precision: str
    cases: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """A kernel that was compiled, or why not."""

    job: Job
    report: Report | None
    error: str = ""


def jobs_for(cases: Iterable[Case], chips: Iterable[Chip], precisions: Iterable[str]) -> list[Job]:
    """The kernels that cases launch, each once.

    Raises RuntimeError in Triton's interpreter mode.
    """
    found: dict[str, Job] = {}
    precisions, cases = tuple(precisions), tuple(cases)
    for chip in chips:
        for precision in precisions:
            for case in cases:
                if not case.wanted(chip, precision):
                    continue
                with capture(chip) as launches:
                    case.run(precision)
                for launch in launches:
                    special = launch.specialise()
                    known = found.get(special.key)
                    label = case.name if len(launches) == 1 else f"{case.name}/{launch.role}"
                    names = tuple(dict.fromkeys([*(known.cases if known else ()), label]))
                    found[special.key] = Job(special, launch, chip, known.precision if known else precision, names)
    return list(found.values())


def compile_kernel(special: Specialisation) -> Report:
    """Compile for the chip that it was captured for; nothing is left in Triton's cache.

    Raises what the compiler raises.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if tuple(int(n) for n in triton.__version__.split(".")[:2]) < OLDEST:
        raise RuntimeError(f"triton: expected at least {'.'.join(map(str, OLDEST))}, got {triton.__version__}.")
    chip = special.chip
    function = getattr(importlib.import_module(special.module), special.name)
    source = ASTSource(function, dict(special.signature), dict(special.constants), dict(special.attributes))
    target = GPUTarget(chip.target, chip.arch, 64 if chip.target == "hip" else 32)
    log, start = io.StringIO(), time.perf_counter()
    with (
        tempfile.TemporaryDirectory() as folder,
        _environment(TRITON_CACHE_DIR=folder, TRITON_DUMP_PTXAS_LOG="1"),
        contextlib.redirect_stdout(log),
    ):
        compiled = triton.compile(source, target=target, options=dict(special.options))
    seconds = time.perf_counter() - start
    if chip.target == "hip":
        return read_amd(compiled, chip, seconds)
    return read_nvidia(compiled, log.getvalue(), chip, seconds)


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _try(special: Specialisation) -> tuple[Report | None, str]:
    """In a worker: the report, or the compiler's words."""
    try:
        return compile_kernel(special), ""
    except Exception as error:  # whatever the compiler stumbles over is a result: other kernels go on
        innermost: BaseException = error  # the compiler wraps an error once for each function it was called from
        while innermost.__cause__ is not None:
            innermost = innermost.__cause__
        return None, f"{type(innermost).__name__}: {innermost}"


def compile_all(jobs: list[Job], workers: int = 2, progress: bool = True) -> list[Outcome]:
    """Compile in processes of their own; outcomes in the order of the jobs."""
    outcomes: dict[int, Outcome] = {}
    # A forked child would inherit PyTorch's threads as locks that nobody releases.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {pool.submit(_try, job.specialisation): i for i, job in enumerate(jobs)}
        for done in as_completed(waiting):
            index = waiting[done]
            outcomes[index] = Outcome(jobs[index], *done.result())
            if progress:
                job, report = jobs[index], outcomes[index].report
                seconds = 0.0 if report is None else report.seconds
                print(f"{len(outcomes)}/{len(jobs)} {job.chip.name} {job.precision} {job.cases[0]} {seconds:.1f} s",
                      file=sys.stderr, flush=True)  # fmt: skip
    return [outcomes[i] for i in range(len(jobs))]


COLUMNS = ("kernel", "case", "precision", "tile", "warps", "stages", "registers", "spilled", "shared KiB", "blocks",
           "matrix", "FFMA", "sin+cos", "copies of 16 B", "smaller", "STS", "BAR", "all", "remarks")  # fmt: skip


def cells(outcome: Outcome) -> list[str]:
    """A row of the table."""
    job, report = outcome.job, outcome.report
    tile = "x".join(str(v) for n, v in job.launch.constants.items() if n.startswith("BLOCK"))
    head = [job.launch.role, "<br>".join(job.cases), job.precision, tile]
    if report is None:
        return [
            *head,
            *[""] * (len(COLUMNS) - len(head) - 1),
            "does not compile: " + outcome.error.split("\n")[0][:200],
        ]
    counts = report.counts
    matrix = " ".join(f"{counts[c]} {c}" for c in ("HGMMA", "UTCMMA", "HMMA", "MFMA") if c in counts)
    remarks = [
        *(["shared memory beyond the chip's"] if report.shared > job.chip.shared else []),
        *([f"{counts['diverging']} diverging branches"] if "diverging" in counts else []),
        *([f"{counts['LDL']} LDL"] if "LDL" in counts else []),
        *report.slow_paths,
    ]
    sines = counts.get("MUFU.SIN", 0) + counts.get("MUFU.COS", 0)
    copies = counts.get("LDGSTS.16", 0) + counts.get("TMA", 0)
    rest = (report.warps, report.stages, report.registers, f"{report.spilled}/{report.reloaded}",
            f"{report.shared / 1024:.1f}", report.blocks, matrix or "none", counts.get("FFMA", 0), sines, copies,
            counts.get("LDGSTS.less", 0), counts.get("STS", 0), counts.get("BAR", 0), counts["all"],
            "; ".join(remarks))  # fmt: skip
    return [*head, *map(str, rest)]


def markdown(outcomes: list[Outcome]) -> str:
    """One table for each chip."""
    parts = []
    for chip in dict.fromkeys(o.job.chip for o in outcomes):
        rows = [cells(o) for o in outcomes if o.job.chip == chip]
        parts.append(f"## {chip.name}\n\n{_table(COLUMNS, rows)}")
    return "\n".join(parts)


def spills(outcomes: list[Outcome]) -> str:
    """The kernels that spill with this compiler, as a list; a sentence where none does."""
    found = [
        f"- {o.job.chip.name}, {o.job.precision}: {', '.join(o.job.cases)}: {o.report.spilled} stored, "
        f"{o.report.reloaded} loaded"
        for o in outcomes
        if o.report and (o.report.spilled or o.report.reloaded)
    ]
    head = f"{len(found)} of {len(outcomes)} kernels spill with triton {triton.__version__}; bytes a thread:"
    return "\n".join([head, "", *found]) + "\n" if found else f"No kernel spills with triton {triton.__version__}.\n"


def _table(columns: Iterable[str], rows: Iterable[list[str]]) -> str:
    lines = [list(columns), ["---"] * len(list(columns)), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


HEADER = """# What the kernels take of a GPU

Compiled without a GPU and read from the compiler's log and the machine code; nothing here is a measured time.
Made on {date} with triton {version} by `{command}`.
Launchers and constants are the real ones (`kernels/capture.py`); `row/...` are the rows of `kernels/tiles.py`,
`step/...` the kernels of a training step, `layer/...` those of layers on their own.

Registers and spilled bytes (stored/loaded) are a thread's, shared memory is a block's, blocks are those that fit on a
multiprocessor at once. The other numbers count instructions in the program, not how often they run: of the matrix unit,
multiply-adds, sines and cosines by the special-function unit, asynchronous copies to shared memory of 16 bytes and of
fewer, stores to shared memory, barriers, all.
"""


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m strainer_fast.kernels.aot", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--chip", nargs="+", choices=sorted(CHIPS), default=list(CHIPS), help="what to compile for")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="cases, such as step or 'row/*'")
    parser.add_argument("--workers", type=int, default=2, help="processes that compile")
    parser.add_argument("--markdown", type=Path, help="write the report here instead of to stdout")
    parser.add_argument("--json", action="store_true", help="numbers for programs, to stdout")
    options = parser.parse_args(arguments)
    cases = [case for case in CASES if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.only)]
    if not cases:
        parser.error(f"--only: expected a pattern such as step or {CASES[0].name}, got {shlex.join(options.only)}")
    try:
        jobs = jobs_for(cases, [CHIPS[name] for name in options.chip], options.precision)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    outcomes = compile_all(jobs, options.workers)
    if options.json:
        print(json.dumps([to_dict(o) for o in outcomes]))
    else:
        command = "python -m strainer_fast.kernels.aot " + shlex.join(sys.argv[1:] if arguments is None else arguments)
        header = HEADER.format(date=datetime.date.today(), version=triton.__version__, command=command.strip())
        chips = [CHIPS[name] for name in options.chip]
        model = f"## A training step, modelled\n\n{assumptions(chips)}\n{summary(chips, options.precision)}"
        text = f"{header}\n## Spills\n\n{spills(outcomes)}\n{markdown(outcomes)}\n{model}"
        if options.markdown:
            write(options.markdown, text)
        else:
            print(text)
    return 0 if all(o.report for o in outcomes) else 1


def to_dict(outcome: Outcome) -> dict[str, object]:
    """For JSON: what was launched, what it takes, or the error."""
    job = outcome.job
    constants = {n: v if isinstance(v, bool | int | float | str) else str(v) for n, v in job.launch.constants.items()}
    return {"kernel": job.launch.name, "chip": job.chip.name, "precision": job.precision, "cases": job.cases,
            "constants": constants, "report": outcome.report and outcome.report.to_dict(),
            "error": outcome.error}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())

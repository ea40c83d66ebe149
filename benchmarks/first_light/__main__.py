"""First light on a GPU: eight stages in processes of their own, every number on the disk at once, a summary last.

    bash benchmarks/first_light/run.sh [--stage N ...] [--small]      what needs nothing but the tree
    bash benchmarks/first_light/run.sh --tune [--seconds 240] [...]    the tiles measured; arguments of kernels.tune

Rows go to $OUT/rows.jsonl, the summary to $OUT/summary.txt, what processes print to $OUT/log.txt. A stage that fails or
runs out of time costs the next one nothing. `python -m strainer_fast.benchmarks.first_light.publish ROWS` puts the rows
into docs/gpu.md. A rehearsal without a GPU: `--small --through "tests.standin run"`.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from strainer_fast.benchmarks.first_light.rows import Log, read
from strainer_fast.benchmarks.first_light.summary import summary

BUDGETS = {1: 30, 2: 120, 3: 60, 4: 90, 5: 60, 6: 60, 7: 45, 8: 60}
"""Stage -> seconds it may take, its start included."""

TOTAL = 535
"""Seconds for all stages together."""

SPARE = 4
"""Seconds before its end at which a stage begins nothing else."""

PARTS = 8
"""Processes of stage 2."""

STAGES = "strainer_fast.benchmarks.first_light.stages"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code: 1 if something failed."""
    parser = argparse.ArgumentParser(
        prog="bash benchmarks/first_light/run.sh",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stage", type=int, nargs="+", choices=sorted(BUDGETS), default=sorted(BUDGETS))
    parser.add_argument("--small", action="store_true", help="sizes of a rehearsal")
    parser.add_argument("--tune", action="store_true", help="measure tiles instead; other arguments go to kernels.tune")
    parser.add_argument("--through", default="", metavar="MODULE", help="run stages through this module")
    parser.add_argument("--patience", type=float, default=1.0, metavar="FACTOR", help="stretch all limits")
    parser.add_argument("--parts", type=int, default=PARTS, help="processes of stage 2")
    options, rest = parser.parse_known_args(arguments)
    if rest and not options.tune:
        parser.error(f"expected the arguments above, got {' '.join(rest)}")
    out = Path(os.environ.get("OUT", "benchmarks/results/first-light"))
    out.mkdir(parents=True, exist_ok=True)
    through = ["-m", *options.through.split()] if options.through else []
    with (out / "log.txt").open("a") as log:
        if options.tune:
            return tune(rest, out, log)
        begin = time.monotonic()
        for stage in options.stage:
            limit = min(BUDGETS[stage], TOTAL - (time.monotonic() - begin) / options.patience) * options.patience
            run_stage(stage, limit, out, log, through, options.small, options.parts if stage == 2 else 1)
    rows = read(out / "rows.jsonl")
    text = summary(rows)
    (out / "summary.txt").write_text(text + "\n")
    print(text)
    return int(any("failed" in row for row in rows))


def run_stage(stage: int, limit: float, out: Path, log: IO[str], through: list[str], small: bool, parts: int) -> None:
    """Start a stage's processes and wait for them, or end them."""
    rows = Log(out / "rows.jsonl", stage)
    print(f"stage {stage}: at most {limit:.0f} s", flush=True)
    if limit < 2 * SPARE:
        rows.row(failed="no time is left for this stage")
        return
    command = [
        sys.executable,
        *(through or ["-m"]),
        STAGES,
        str(stage),
        "--out",
        str(out),
        "--until",
        str(rows.begin + limit - SPARE),
    ] + ["--small"] * small
    started = [
        subprocess.Popen(
            [*command, "--part", f"{part}/{parts}"], stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        for part in range(parts)
    ]
    try:
        for number, process in enumerate(started):
            try:
                code = process.wait(max(0.1, limit - (time.monotonic() - rows.begin)))
                if code:
                    rows.row(part=number, failed=f"the process ended with code {code}: see log.txt", trace=tail(out))
            except subprocess.TimeoutExpired:
                rows.row(part=number, failed=f"the process was ended after {limit:.0f} s", trace=tail(out))
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    rows.row(part="all", took_s=round(time.monotonic() - rows.begin, 1))


def tail(out: Path, lines: int = 6) -> list[str]:
    """The end of what was printed."""
    return (out / "log.txt").read_text(errors="replace").splitlines()[-lines:]


def tune(arguments: list[str], out: Path, log: IO[str]) -> int:
    """The tuner with a budget, and what it changed in the table of tiles."""
    budget = [] if "--seconds" in arguments else ["--seconds", "230"]
    command = [sys.executable, "-m", "strainer_fast.kernels.tune", *budget, *arguments]
    try:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=270, check=False)
        code = done.returncode
    except subprocess.TimeoutExpired:
        code = 124
    (out / "tiles.py.txt").write_text(Path("kernels/tiles.py").read_text())
    print("\n".join([*tail(out, 40), f"tune: code {code}; the table as it is now: {out / 'tiles.py.txt'}"]))
    return code


if __name__ == "__main__":
    sys.exit(main())

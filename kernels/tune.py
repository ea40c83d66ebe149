"""Measures, on a GPU, which tiles are fastest and writes the table of tiles anew: `make tune`.

    python -m strainer_fast.kernels.tune [--kernel forward ...] [--precision fp16 ...] [--width 256 ...]
                                         [--seconds 240] [--out tune.jsonl] [--apply]

From each row of this GPU's generation the search walks to the fastest legal neighbour (one size doubled or halved,
other warps, one stage more or less) until none is faster. A neighbour counts only if it gives the row's own result.
Rows come in the order of what a 178x178 fp16 step spends on them by the model (roofline.py); the table is written after
each. With --out every row's result is a line of a file, which a later run goes on from. --apply writes the table from
such a file and measures nothing: for results of another machine. Rows of other generations stay as they are.
"""

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import triton

from . import tiles as tiles_module
from .capture import capture, table
from .cases import ONCE, POINTS, ROW_CASES, WIDTH, row_name, row_precisions, stacked_step, step
from .chip import CHIPS, Chip, current_chip
from .configs import generation, illegal
from .mm import PRECISIONS
from .roofline import step_times
from .table_file import same_place, write_table
from .tiles import TABLE, Row, Tiles
from .tune_gpu import DeviceLost, GpuClock

WORTH = 0.98
"""Tiles replace others only where they take less than this share of their time: noise must not rewrite the table."""

AHEAD = 3
"""Rows whose neighbours are compiled while one is measured."""

SIZES = {"heads": ("points",), "network_forward": ("points",), "network_step": ("points", "inputs")}
"""What can be changed of tiles where the rest is the layer's width or says what the row is for; elsewhere all three."""


class Clock(Protocol):
    """Measures rows; tune_gpu.GpuClock, or a test's."""

    def compile(self, choices: Sequence[Row]) -> None:
        """Begin with what `seconds` of these will need."""

    def seconds(self, choices: Sequence[Row]) -> list[float]:
        """Of each, measured side by side; infinity for those that cannot run or give another result than the first."""


@dataclass(frozen=True)
class Result:
    """What measuring a row and its neighbours gave."""

    row: Row  # as it stood
    best: Row
    faster: float = 1.0  # how many times
    tried: tuple[tuple[Tiles, float], ...] = ()  # seconds, as they came: of several rounds
    whole: bool = True  # false where the time was up before the search was
    error: str = ""

    def line(self) -> str:
        """For people."""
        found = "unchanged" if self.best == self.row else f"-> {self.best.tiles}"
        end = f" ({self.error})" if self.error else "" if self.whole else " (time is up)"
        return f"{row_name(self.row)}: {self.row.tiles} {found}, {self.faster:.2f} times as fast{end}"

    def to_dict(self, machine: dict[str, str]) -> dict[str, Any]:
        """For --out."""
        tried = [[*astuple(t), s if math.isfinite(s) else None] for t, s in self.tried]
        return {"row": row_name(self.row), **machine, "old": astuple(self.row.tiles), "new": astuple(self.best.tiles),
                "faster": self.faster, "whole": self.whole, "error": self.error, "tried": tried}  # fmt: skip


def neighbours(row: Row, chip: Chip) -> Iterator[Tiles]:
    """Legal tiles one step away."""
    t = row.tiles
    sizes = SIZES.get(row.kernel, ("points", "outputs", "inputs"))
    steps: dict[str, tuple[int, ...]] = {
        **{name: (getattr(t, name) // 2, getattr(t, name) * 2) for name in sizes},
        "warps": (12 - t.warps,),  # 4 or 8
        "stages": (t.stages - 1, t.stages + 1),
    }
    widest = 1 << max(4, math.ceil(math.log2(min(row.width, WIDTH))))
    for name, values in steps.items():
        for value in values:
            other = replace(row, tiles=replace(t, **{name: value}))
            wider = name in ("outputs", "inputs") and value > widest
            if not wider and illegal(other, chip) is None:
                yield other.tiles


def first_round(row: Row, chip: Chip) -> list[Row]:
    """A row and its neighbours."""
    return [row, *(replace(row, tiles=t) for t in neighbours(row, chip))]


def tune_row(row: Row, chip: Chip, clock: Clock, time_left: Callable[[], bool] = lambda: True) -> Result:
    """The fastest tiles found from a row's own; at least one round is measured."""
    best, faster, tried = row, 1.0, list[tuple[Tiles, float]]()
    seen = {row.tiles}
    while True:
        choices = [best, *(c for c in first_round(best, chip)[1:] if c.tiles not in seen)]
        seen.update(c.tiles for c in choices)
        if len(choices) == 1:
            return Result(row, best, faster, tuple(tried))
        if tried and not time_left():
            return Result(row, best, faster, tuple(tried), whole=False)
        seconds = clock.seconds(choices)
        tried += [(c.tiles, s) for c, s in zip(choices, seconds, strict=True)]
        fastest = min(range(len(choices)), key=lambda i: seconds[i])
        if not seconds[fastest] < WORTH * seconds[0]:
            return Result(row, best, faster, tuple(tried))
        # Tiles that cannot run at all are no measure of how much faster others are.
        faster *= seconds[0] / seconds[fastest] if math.isfinite(seconds[0]) else 1.0
        best = choices[fastest]


def tune(
    rows: Sequence[Row],
    wanted: Sequence[Row],
    chip: Chip,
    clock: Clock,
    finished: Callable[[Sequence[Row], Result], None],
    time_left: Callable[[], bool] = lambda: True,
) -> list[Row]:
    """A table with the wanted of its rows tuned, in their order, for as long as there is time.

    Args:
        rows: the table.
        wanted: rows of it.
        chip: measured on.
        clock: what measures.
        finished: called with the table so far after each row.
        time_left: asked before each round; the search stops between rounds.
    """
    tuned = list(rows)
    for index, row in enumerate(wanted):
        if not time_left():
            break
        for soon in wanted[index : index + 1 + AHEAD]:
            clock.compile(first_round(soon, chip))
        try:
            result = tune_row(row, chip, clock, time_left)
        except DeviceLost as error:
            finished(tuned, Result(row, row, error=str(error)))
            raise
        tuned[next(i for i, r in enumerate(tuned) if same_place(r, row))] = result.best
        finished(tuned, result)
    return tuned


def wanted_rows(
    rows: Iterable[Row],
    chip: Chip,
    kernels: Sequence[str] = (),
    precisions: Sequence[str] = (),
    widths: Sequence[int] = (),
) -> list[Row]:
    """The rows of a chip that can be measured, dearest first; empty filters let all pass.

    Widths are those of the layer that a row is measured with: WIDTH for rows without a limit.
    """
    own = [r for r in rows if r.generation == generation(chip) and r.kernel in ROW_CASES and r.kernel not in ONCE]
    found = [
        r
        for r in own
        if (not kernels or r.kernel in kernels)
        and (not precisions or set(precisions) & set(row_precisions(r)))
        and (not widths or min(r.width, WIDTH) in widths)
    ]
    spent = costs(own, chip)
    return sorted(found, key=lambda r: [-s for s in spent[r]])


def costs(rows: Sequence[Row], chip: Chip) -> dict[Row, list[float]]:
    """Modelled seconds that steps spend on each row: of an fp16 step of 178x178, of a stack, then in the others."""
    # Launches carry their number of stages, which the model does not look at: here it is the number of the row.
    first = 1000
    marked = [replace(r, tiles=replace(r.tiles, stages=first + i)) for i, r in enumerate(rows)]
    spent: dict[Row, list[float]] = {row: [] for row in rows}
    steps: list[Callable[[str], None]] = [partial(step, points=POINTS), stacked_step]
    known = chip if chip.name in CHIPS else nearest(chip)
    for precision in ("fp16", "tf32", "tf32x3", "fp32"):
        for run in steps:
            with table(marked), capture(known) as launches:
                run(precision)
            seconds = dict.fromkeys(rows, 0.0)
            for launch, took in zip(launches, step_times(launches, known), strict=True):
                index = launch.options.get("num_stages", 0) - first
                if index >= 0:
                    seconds[rows[index]] += took.total
            for row in rows:
                spent[row].append(seconds[row])
    return spent


def nearest(chip: Chip) -> Chip:
    """A chip that the model knows, of the same generation."""
    return next(c for c in CHIPS.values() if generation(c) == generation(chip))


def read_results(path: Path, rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The lines of an --out file that are about rows of this table; a line cut short by an interruption is left out."""
    names, found = {row_name(row) for row in rows}, []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], 1):
        try:
            line = json.loads(text)
            Tiles(*map(int, line["new"]))
            good = line["row"] in names and isinstance(line["whole"], bool)
        except (ValueError, TypeError, KeyError):
            good = False
        if good:
            found.append(line)
        else:
            print(f"{path}:{number}: left out, expected a result of a row of this table", file=sys.stderr)
    return found


def apply(results: Iterable[dict[str, Any]], rows: Sequence[Row]) -> list[Row]:
    """The table with the tiles of an --out file, later lines over earlier ones.

    Raises ValueError for tiles that no chip of their row's generation could run.
    """
    changed = {row_name(row): row for row in rows}
    for line in results:
        row = changed[line["row"]]
        other = replace(row, tiles=Tiles(*map(int, line["new"])))
        reasons = [illegal(other, chip) for chip in CHIPS.values() if generation(chip) == row.generation]
        if all(reasons) or not same_place(row, other):
            raise ValueError(f"{line['row']}: expected legal tiles, got {line['new']}. {reasons[0] or ''}")
        changed[line["row"]] = other
    return list(changed.values())


def machine_of(chip: Chip) -> dict[str, str]:
    """What a result is of."""
    return {"gpu": torch.cuda.get_device_name(), "chip": chip.name, "triton": triton.__version__}


def run(
    chip: Chip,
    clock: Clock,
    wanted: Sequence[Row],
    rows: Sequence[Row],
    path: Path,
    out: Path | None,
    machine: dict[str, str],
    time_left: Callable[[], bool],
) -> list[Row]:
    """Tune, write the table to `path` after each row, then its line to `out`; rows that `out` has are not repeated."""
    if out:
        lines = [line for line in read_results(out, rows) if all(line.get(k) == v for k, v in machine.items())]
        before, rows = list(rows), apply(lines, rows)
        if before != rows:
            write_table(path, rows)
        done = {line["row"] for line in lines if line["whole"]}
        now = {row_name(row): row for row in rows}
        left = [now[row_name(row)] for row in wanted if row_name(row) not in done]
        print(f"{out}: {len(wanted) - len(left)} rows are measured, {len(left)} left", file=sys.stderr)
        wanted = left

    def finished(tuned: Sequence[Row], result: Result) -> None:
        print(result.line(), file=sys.stderr, flush=True)
        if result.best != result.row:
            write_table(path, tuned)
        if out:
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result.to_dict(machine)) + "\n")

    return tune(rows, wanted, chip, clock, finished, time_left)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m strainer_fast.kernels.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--kernel", nargs="+", choices=sorted({*ROW_CASES} - {*ONCE}), default=[], help="only rows of these"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=[], help="only rows of these")
    parser.add_argument("--width", nargs="+", type=int, default=[], help="only rows measured at these; 256: the widest")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop cleanly after so long")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    parser.add_argument("--out", type=Path, help="append results here, and go on from those that it holds")
    parser.add_argument("--apply", action="store_true", help="write the table from --out; measure nothing")
    options = parser.parse_args(arguments)
    start, path = time.monotonic(), Path(tiles_module.__file__)
    if options.apply and not (options.out and options.out.exists()):
        parser.error(f"--apply: expected a file of results as --out, got {options.out}")
    try:
        if options.apply:
            rows = apply(read_results(options.out, TABLE), TABLE)
            write_table(path, rows)
        elif not torch.cuda.is_available():
            print("tune: expected a CUDA device to measure on, found none. `make aot` compiles without one.",
                  file=sys.stderr)  # fmt: skip
            return 2
        else:
            chip = current_chip()
            wanted = wanted_rows(TABLE, chip, options.kernel, options.precision, options.width)
            with GpuClock(TABLE, chip, options.workers) as clock:
                rows = run(chip, clock, wanted, TABLE, path, options.out, machine_of(chip),
                           lambda: time.monotonic() - start < options.seconds)  # fmt: skip
    except (RuntimeError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {path} has what was finished", file=sys.stderr)
        return 130
    changed = sum(a != b for a, b in zip(TABLE, rows, strict=True))
    print(f"{changed} rows changed in {path}. Now run make check and aot.")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Measures, on a GPU, which tiles are fastest and writes the table of tiles anew: `make tune`.

    python -m strainer_fast.kernels.tune [--kernel forward ...]

From each row of this GPU's generation the search walks to the fastest legal neighbour (one size doubled or halved,
other warps, one stage more or less) until none is faster. Rows of other generations stay as they are.
"""

import argparse
import ast
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import tiles as tiles_module
from .aot import write
from .capture import capture, table
from .cases import FEW_POINTS, ONCE, POINTS, ROW_CASES, WIDTH, row_name, row_precisions
from .chip import Chip, current_chip
from .configs import generation, illegal
from .tiles import ANY, TABLE, Row, Tiles

Call = Callable[[], None]
Clock = Callable[[Sequence[Call]], list[float]]
"""Seconds of each of some calls, measured side by side; infinity for those that cannot run."""

ROUNDS, REPEATS = 20, 5
"""Medians are over ROUNDS; in each, every call runs REPEATS times in a row."""

WORTH = 0.98
"""Tiles replace others only where they take less than this share of their time: noise must not rewrite the table."""


def neighbours(row: Row, chip: Chip) -> Iterator[Tiles]:
    """Legal tiles one step away."""
    t = row.tiles
    steps: dict[str, tuple[int, ...]] = {
        **{name: (getattr(t, name) // 2, getattr(t, name) * 2) for name in ("points", "outputs", "inputs")},
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


def cuda_clock(calls: Sequence[Call]) -> list[float]:
    """Medians by CUDA events, interleaved so that a change of clocks meets every call alike."""
    able = []
    for call in calls:
        try:
            call()
            torch.cuda.synchronize()
            able.append(True)
        except Exception as error:  # too much shared memory, or what else the compiler finds only here
            print(f"  skipped: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
            able.append(False)
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for index, call in enumerate(calls):
            if not able[index]:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            for _ in range(REPEATS):
                call()
            end.record()
            end.synchronize()
            samples[index].append(start.elapsed_time(end) * 1e-3 / REPEATS)
    return [statistics.median(s) if s else math.inf for s in samples]


def call_of(row: Row, rows: Sequence[Row], chip: Chip, device: str) -> Call:
    """The launch of a row's representative layer with the row's tiles."""
    points, width = FEW_POINTS if row.few else POINTS, min(row.width, WIDTH)
    with table(row if same_place(row, r) else r for r in rows), capture(chip, device) as launches:
        ROW_CASES[row.kernel](row_precisions(row)[0], points, width)
    return launches[0].run


def same_place(a: Row, b: Row) -> bool:
    """Whether two rows differ at most in their tiles."""
    return replace(a, tiles=b.tiles) == b


def tune_row(row: Row, rows: Sequence[Row], chip: Chip, clock: Clock, device: str = "cuda") -> tuple[Row, float]:
    """The row with the fastest tiles found, and how many times faster they are than its own."""
    best, faster, tried = row, 1.0, {row.tiles}
    while True:
        candidates = [t for t in neighbours(best, chip) if t not in tried]
        if not candidates:
            return best, faster
        tried.update(candidates)
        choices = [best, *(replace(row, tiles=t) for t in candidates)]
        seconds = clock([call_of(choice, rows, chip, device) for choice in choices])
        fastest = min(range(len(choices)), key=lambda i: seconds[i])
        if not seconds[fastest] < WORTH * seconds[0]:
            return best, faster
        # Tiles that cannot run at all are no measure of how much faster others are.
        faster *= seconds[0] / seconds[fastest] if math.isfinite(seconds[0]) else 1.0
        best = choices[fastest]


def tune(rows: Sequence[Row], chip: Chip, clock: Clock, device: str = "cuda", kernels: Sequence[str] = ()) -> list[Row]:
    """The table with this chip's rows tuned; progress goes to stderr."""
    tuned = []
    for row in rows:
        tunable = row.kernel in ROW_CASES and row.kernel not in ONCE
        wanted = row.generation == generation(chip) and tunable and row.kernel in (kernels or ROW_CASES)
        best, faster = tune_row(row, rows, chip, clock, device) if wanted else (row, 1.0)
        if wanted:
            print(f"{row_name(row)}: {best.tiles}, {faster:.2f} times as fast", file=sys.stderr, flush=True)
        tuned.append(best)
    return tuned


def literal(row: Row) -> str:
    """A row as it stands in tiles.py."""
    names: dict[tuple[str, ...], str] = {("half",): "HALF", ("tf32",): "TF32", ("fp32",): "FP32"}
    precisions = names.get(row.precisions) or "(" + ", ".join(f'"{p}"' for p in row.precisions) + ")"
    t = row.tiles
    sizes = f"Tiles({t.points}, {t.outputs}, {t.inputs}, {t.warps}, {t.stages})"
    width = "ANY" if row.width == ANY else str(row.width)
    return f'Row("{row.kernel}", "{row.generation}", {precisions}, {width}, {sizes}{", few=True" if row.few else ""}),'


def rewrite(text: str, rows: Sequence[Row]) -> str:
    """tiles.py with other rows in its table, one a line, in the same order; comments stay before their rows.

    Raises ValueError where the rows are not those of the text but for their tiles.
    """
    tree = ast.parse(text)
    assign = next(node for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "TABLE")
    assert isinstance(assign.value, ast.Tuple), "the table is written as a tuple"
    lines, names = text.splitlines(), vars(tiles_module)
    written, left, seen = [], list(rows), assign.lineno
    for element in assign.value.elts:
        between = lines[seen : element.lineno - 1]
        written += [line for line in between if line.strip().startswith("#")]
        expression = ast.fix_missing_locations(ast.Expression(ast.Tuple([element], ast.Load())))
        for old in eval(compile(expression, "tiles.py", "eval"), dict(names)):
            if not left or not same_place(old, left[0]):
                raise ValueError(
                    f"rows: expected one for {row_name(old)} next, got {left[:1]}. Keep the table's order."
                )
            written.append("    " + literal(left.pop(0)))
        seen = element.end_lineno or seen
    if left:
        raise ValueError(f"rows: expected no more than the file has, got {len(left)} more, {row_name(left[0])} first.")
    end = assign.end_lineno or len(lines)
    return "\n".join([*lines[: assign.lineno], *written, *lines[end - 1 :]]) + "\n"


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """Put rows into a tiles.py, which is read back before it replaces the old one.

    Raises ValueError as `rewrite`, or if Python reads other rows than were meant.
    """
    text = rewrite(path.read_text(encoding="utf-8"), rows)
    names: dict[str, object] = {"__name__": tiles_module.__name__}  # dataclasses look their module up
    exec(compile(text, str(path), "exec"), names)
    if [repr(row) for row in names["TABLE"]] != [repr(row) for row in rows]:  # type: ignore[attr-defined]
        raise ValueError(f"{path}: expected the tuned rows when read back, got others. The old file is untouched.")
    write(path, text)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m strainer_fast.kernels.tune", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--kernel", nargs="+", choices=sorted(ROW_CASES), default=[], help="only rows of these")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "tune: expected a CUDA device to measure on, found none. `make aot` compiles without one.", file=sys.stderr
        )
        return 2
    path = Path(tiles_module.__file__)
    try:
        rows = tune(TABLE, current_chip(), cuda_clock, kernels=options.kernel)
        write_table(path, rows)
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"{sum(a != b for a, b in zip(TABLE, rows, strict=True))} rows changed in {path}. Now run make check and aot."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""A model of a step of K-FAC on a GPU: the sweep and its own launches by roofline.py, PyTorch's products counted here.

Nothing here is measured. The factors' refresh is spread over the steps between two of them.

    python -m strainer_fast.kernels.kfac_model --chip sm_90 --precision fp16
"""

import argparse
import math
import sys
from dataclasses import dataclass

from .capture import capture
from .cases import CHANNELS, COORDINATES, LAYERS, POINTS, WIDTH, kfac, step
from .chip import CHIPS, Chip
from .mm import PRECISIONS
from .roofline import LAUNCH, MEMORY_SHARE, PEAKS, VECTOR_SHARE, assumptions, step_times

FACTOR_POINTS, REFRESH_EVERY = 4096, 10
"""As strainer_fast.fitting.kfac and the preset `fast` have them."""

TILE = 64
"""Rows and columns of a library's product in float32, one program each: what a stack of 256x256 has to share out."""

COLUMN = 4e-6
"""Seconds that a Cholesky factorisation takes for a column, whatever the size of the stack: one waits for the other."""

SPLIT = 8
"""Shares of a product whose inner side is long, as libraries have them."""

CALL = 5e-6
"""Seconds of a call of PyTorch outside of a graph: what the host takes to ask for it."""

REFRESH_CALLS = 180
"""PyTorch operations of a refresh: `python -m tests.standin` counts them."""


@dataclass(frozen=True)
class Part:
    """Of a step, in seconds."""

    name: str
    seconds: float


def product(batch: int, rows: int, columns: int, inner: int, chip: Chip) -> float:
    """Seconds of a batched product in float32 by multiply-adds, in tiles that fill the chip in whole rounds."""
    peaks = PEAKS[chip.name]
    programs = batch * math.ceil(rows / TILE) * math.ceil(columns / TILE)
    if inner > 4 * max(rows, columns):
        programs, inner = SPLIT * programs, math.ceil(inner / SPLIT)
    each = 2 * TILE * TILE * inner / (VECTOR_SHARE * peaks.fp32 * 1e12 / chip.processors)
    return math.ceil(programs / chip.processors) * each + LAUNCH


def refresh(chip: Chip) -> float:
    """Seconds of new factors for all layers: forward and back over a sample of points, moments, damped inverses."""
    hidden = LAYERS - 1
    elementwise = 4.0 * FACTOR_POINTS * WIDTH / (MEMORY_SHARE * PEAKS[chip.name].memory * 1e12) + LAUNCH
    passes = 2 * hidden * product(1, FACTOR_POINTS, WIDTH, WIDTH, chip) + 7 * LAYERS * elementwise
    moments = 2 * LAYERS * product(1, WIDTH + 1, WIDTH + 1, FACTOR_POINTS, chip)
    size = WIDTH + 1
    # A triangular solve goes by columns as a factorisation does, but in blocks of 32.
    inverses = size * COLUMN + size / 32 * COLUMN + product(2 * LAYERS, size, size, size, chip)
    return max(passes + moments + inverses, REFRESH_CALLS * CALL)


def parts(chip: Chip, precision: str, points: int = POINTS) -> list[Part]:
    """A step of the paper's network."""
    with capture(chip) as launches:
        step(precision, points=points)
    sweep = [t for t in step_times(launches, chip) if t.name != "adam"]
    with capture(chip) as own:
        kfac(precision)
    return [
        Part("loss and gradients", sum(t.total for t in sweep)),
        *(Part(t.name, t.total) for t in step_times(own, chip)),
        Part("products of hidden layers", product(LAYERS - 1, WIDTH, WIDTH + 1, WIDTH, chip)
             + product(LAYERS - 1, WIDTH, WIDTH + 1, WIDTH + 1, chip)),
        Part("products of first layer and head", product(1, WIDTH, COORDINATES + 1, WIDTH, chip)
             + product(1, CHANNELS, WIDTH + 1, WIDTH + 1, chip) + 2 * LAUNCH),
        Part("refresh, a tenth", refresh(chip) / REFRESH_EVERY),
    ]  # fmt: skip


def summary(chips: list[Chip], precisions: list[str], points: int = POINTS) -> str:
    """Microseconds of each part, and of a step of Adam beside it, as a Markdown table."""
    lines = []
    for chip in chips:
        for precision in precisions:
            found = parts(chip, precision, points)
            with capture(chip) as launches:
                step(precision, points=points)
            adam = sum(t.total for t in step_times(launches, chip))
            total = sum(part.seconds for part in found)
            lines += [f"### {chip.name} {precision}\n", "| part | us |", "|---|---|"]
            lines += [f"| {part.name} | {part.seconds * 1e6:.1f} |" for part in found]
            lines.append(f"| K-FAC's step | {total * 1e6:.0f} = {total / adam:.1f} times Adam's {adam * 1e6:.0f} |\n")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m strainer_fast.kernels.kfac_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--chip", nargs="+", choices=sorted(CHIPS), default=["sm_80", "sm_90"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp16", "tf32"])
    parser.add_argument("--points", type=int, default=POINTS)
    options = parser.parse_args(arguments)
    chips = [CHIPS[name] for name in options.chip]
    try:
        print(assumptions(chips))
        print(
            f"K-FAC besides: products in float32 by multiply-adds in tiles of {TILE}x{TILE}, whole rounds; "
            f"{COLUMN * 1e6:.0f} us a column of a factorisation; {CALL * 1e6:.0f} us a call of PyTorch in a refresh.\n"
        )
        print(summary(chips, options.precision, options.points))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

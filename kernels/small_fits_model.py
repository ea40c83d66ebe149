"""A model of whole small fits (small_fits.py) on a GPU, as roofline.py is of a training step. Nothing is measured.

    python -m strainer_fast.kernels.small_fits_model [--chip sm_90] [--precision fp16] [--width 32 64]

Programs do one thing after the other, few of them at a time: beside what bounds other kernels there is the time that a
program takes for its steps however fast everything else is. It rests on the three numbers below.
"""

import argparse
import math
import sys
from dataclasses import replace

from .capture import Launch, capture
from .cases import CHANNELS, COORDINATES, SMALL_LAYERS, SMALL_POINTS, SMALL_STEPS, small_fits
from .chip import CHIPS, Chip
from .mm import PRECISIONS
from .roofline import L2_SHARE, PEAKS, Cache, Time, Work, assumptions, time_of

SLOTS = 45
"""Instructions a lane, for each element of a layer, in all. Compiled (sm_90, fp16, width 32): 2,175 for a tile of 64
points and three layers, on 128 lanes."""

PHASE = 2000
"""Clocks of a program for a layer of a tile, forward or back, or the head. Compiled: 79 barriers for seven of these,
eleven each, assumed at 100 clocks (shared memory written, awaited, read); the rest for loads from L2, at 300."""

UPDATE = 1000
"""Clocks of a program for 1,024 parameters of Adam."""


def work_of(launch: Launch) -> tuple[Work, float]:
    """What a launch has to do if no network stops before `until`, and the clocks of its longest program."""
    a, c, work = launch.arguments, launch.constants, Work()
    width, hidden, parameters, layers = c["BLOCK_H"], a["hidden"], a["parameters"], a["hidden"] + 1
    steps = a["num_rows"] * a["until"]  # of all networks
    tiles = math.ceil(a["points"] / c["BLOCK_P"])
    elements = steps * tiles * c["BLOCK_P"] * width
    flops = 3 * 2 * elements * (hidden * width + c["BLOCK_C"])
    work.product, work.thin = (0.0, flops) if c["PRECISION"] == "fp32" else (flops, 0.0)
    work.sines(elements * layers, True, c["PRECISION"], launch.chip)
    work.slots = elements * layers * SLOTS
    # As if the first cache held nothing. A tile: sine and cosine written and read, a weight read twice, a gradient's
    # sum read and written; a step: Adam's arrays, the samples.
    scratch, weights = a["scratch_ptr"].element_size(), hidden * width * width * 4
    work.cache = 4 * elements * layers * scratch + steps * tiles * 4 * weights
    work.cache += steps * (parameters * 4 * 9 + a["points"] * a["channels"] * 4)
    state = tuple(a[name] for name in ("parameters_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"))
    work.reads, work.writes = (a["values_ptr"], *state), (*state, a["mse_ptr"])
    clocks = tiles * (2 * layers + 1) * PHASE + math.ceil(parameters / 1024) * UPDATE
    return work, math.ceil(a["num_rows"] / launch.grid[0]) * a["until"] * clocks


def launch_time(launch: Launch, chip: Chip) -> Time:
    """Of one launch, with the term "latency"."""
    work, clocks = work_of(launch)
    peaks = PEAKS[chip.name]
    time = time_of(launch, work, chip, Cache(L2_SHARE * 1e6 * peaks.l2_size))
    return replace(time, terms=time.terms | {"latency": clocks / (peaks.clock * 1e9)})


def launch_of(chip: Chip, precision: str, width: int) -> Launch:
    """As many networks as keep all programs busy."""
    with capture(chip) as launches:
        small_fits(precision, width=width)
    return launches[0]


def summary(chips: list[Chip], precisions: list[str], widths: list[int]) -> str:
    """Fits a second, as a Markdown table; microseconds are those that a program takes for a step."""
    lines = [
        f"Networks {COORDINATES}-WIDTHx{SMALL_LAYERS}-{CHANNELS} on {SMALL_POINTS} points, {SMALL_STEPS} steps:\n",
        "| chip | precision | width | programs | us a step | fits/s | bound | others |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for chip in chips:
        for precision in precisions:
            for width in widths:
                launch = launch_of(chip, precision, width)
                time, networks = launch_time(launch, chip), launch.arguments["num_rows"]
                step = time.total * launch.grid[0] / (networks * SMALL_STEPS)
                others = ", ".join(f"{n} {t / time.total:.0%}" for n, t in time.terms.items() if n != time.bound)
                cells = (chip.name, precision, width, launch.grid[0], f"{step * 1e6:.0f}",
                         f"{networks / time.total:,.0f}", time.bound, others)  # fmt: skip
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m strainer_fast.kernels.small_fits_model", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    nvidia = [name for name, chip in CHIPS.items() if chip.target == "cuda"]
    parser.add_argument("--chip", nargs="+", choices=nvidia, default=["sm_80", "sm_90"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp16", "tf32", "fp32"])
    parser.add_argument("--width", nargs="+", type=int, default=[32, 64])
    options = parser.parse_args(arguments)
    chips = [CHIPS[name] for name in options.chip]
    try:
        print(assumptions(chips))
        print(f"Whole fits besides: {SLOTS} instructions an element of a layer, {PHASE} clocks a layer of a tile one "
              f"after the other, {UPDATE} for 1,024 parameters of Adam.\n")  # fmt: skip
        print(summary(chips, options.precision, options.width))
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Where the native engine's cycles go: `python -m strainer_fast.benchmarks.native_profile` (Linux, needs perf).

Runs training steps and whole fits in a process of their own under `perf record` and prints each function's share of the
engine's samples.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import torch

from strainer_fast.benchmarks.cases import CASES, Problem
from strainer_fast.benchmarks.datasets import providers
from strainer_fast.benchmarks.datasets.cases import CASES as SETS
from strainer_fast.benchmarks.step_peers import ours as step_of

FITS = "28x28 digits, 3x32"

PARTS = {  # function in kernels/cpu/tile.inl -> what it does
    "forward_panel": "forward products, bias, sine and cosine",
    "backward_panel": "products back to the features, cosine, bias gradients",
    "outer": "weight gradients",
    "weight_gradient": "weight gradients of the first layer",
    "sweep": "linear head of few outputs, residual, placing points",
    "pack_layer": "packing weights",
    "fold": "packing weights",
    "adam": "Adam",
}


def run(what: str) -> None:
    """The work that is profiled, on one thread."""
    torch.set_num_threads(1)
    if what == "fits":
        case = SETS[FITS]
        providers.ours(case, None)(case.images()[:256])
    else:
        step = step_of(Problem.of(next(c for c in CASES if c.name == "178x178, 5x256")))
        for _ in range(20):
            step()


def shares(what: str) -> Counter[str]:
    """Share of the engine's samples by part, in percent."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "perf.data")
        me = [sys.executable, "-m", "strainer_fast.benchmarks.native_profile", "--run", what]
        command = ["perf", "record", "-q", "-o", data, *me]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report = subprocess.run(
            ["perf", "report", "-i", data, "--stdio", "--sort", "dso,symbol"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found: dict[str, float] = defaultdict(float)
    for share, symbol in re.findall(r"^\s*([\d.]+)%\s+_engine\S*\s+\[\.\] (.*)$", report, re.MULTILINE):
        name = re.match(r"(?:void )?(\w+)", symbol.replace("(anonymous namespace)::", ""))
        found[PARTS.get(name[1] if name else "", "the rest")] += float(share)
    total = sum(found.values())
    return Counter({part: 100 * share / total for part, share in found.items()})


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", choices=("step", "fits"))
    arguments = parser.parse_args()
    if arguments.run is not None:
        run(arguments.run)
        return
    if shutil.which("perf") is None:
        sys.exit("perf: not found. It comes with the kernel's tools (linux-perf, linux-tools).")
    for what, title in (("step", "a step of 178x178, 5x256"), ("fits", f"fits of {FITS}")):
        print(f"{title}, one thread, percent of the engine's samples:")
        for part, share in shares(what).most_common():
            print(f"  {share:5.1f}  {part}")


if __name__ == "__main__":
    main()

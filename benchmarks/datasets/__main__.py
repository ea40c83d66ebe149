"""Fits per second over whole data sets, ours beside the ways people do it; durability; processes against threads.

python -m strainer_fast.benchmarks.datasets fits          # fixed steps, and 30 and 35 dB, for N signals
python -m strainer_fast.benchmarks.datasets durability    # fit_dataset with its files and without
python -m strainer_fast.benchmarks.datasets split         # two cores: one process with two threads, or two with one
python -m strainer_fast.benchmarks.datasets parallel      # how many signals at a time
python -m strainer_fast.benchmarks.datasets ten-thousand  # 10,000 digits, killed three times, resumed, verified
python -m strainer_fast.benchmarks.datasets write         # the tables in docs/datasets.md

Rows go to benchmarks/results/datasets.jsonl; the last one of a case, provider and N counts.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import numpy as np
import torch

from strainer_fast.benchmarks.datasets import providers, runs
from strainer_fast.benchmarks.datasets.cases import CASES, Case
from strainer_fast.benchmarks.harness import ParityError, machine
from strainer_fast.benchmarks.tables import replace_between
from strainer_fast.benchmarks.time_to_psnr.__main__ import append, read_rows

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "benchmarks" / "results" / "datasets.jsonl"
DOCUMENT = ROOT / "docs" / "datasets.md"
ROUNDS = 3
GATE_DB = 0.01
"""Between the median PSNR of a provider and the loop's, on the same signals after the same steps."""
TARGETS = (None, 30.0, 35.0)
LONG = 256
"""From so many signals on, and from a trained encoder, there is one round."""

LOOP, LOOP_2 = "Python loop, 1 thread", "Python loop, 2 threads"
OURS = "strainer_fast"
PROVIDERS: dict[str, Any] = {
    OURS: providers.ours,
    LOOP: providers.loop,
    LOOP_2: providers.loop,
    "torch.func.vmap": lambda *a: providers.stacked("vmap", *a),
    "bmm by hand": lambda *a: providers.stacked("bmm", *a),
    "JAX vmap": providers.Jax,
}
STACKED_POINTS = 2**20
"""Points x signals beyond which a stack of autograd is not tried: its activations take gigabytes."""


def measure(case: Case, number: int, target: float | None) -> None:
    """All providers in turn, round after round; the first round warms up and is checked."""
    images = case.images()[np.arange(number) % len(case.images())]
    points = images.shape[1] * images.shape[2]
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        going: dict[str, Any] = {}
        for name, build in PROVIDERS.items():
            is_loop, is_stack = name in (LOOP, LOOP_2), name not in (OURS, LOOP, LOOP_2)
            if (is_loop and number > case.few) or (is_stack and (number * points > STACKED_POINTS or case.pretrained)):
                continue
            going[name] = build(case, target)
            if hasattr(going[name], "close"):
                stack.enter_context(closing(going[name]))
        rates: dict[str, list[float]] = {name: [] for name in going}
        found: dict[str, providers.Reached] = {}
        for turn in range(1 + (1 if number >= LONG or case.pretrained else ROUNDS)):
            for name, run in going.items():
                torch.set_num_threads(1 if name == LOOP else 2)
                begin = time.perf_counter()
                found[name] = run(images)
                if turn:
                    rates[name].append(number / (time.perf_counter() - begin))
            if not turn:
                _gate(found, target)
    for name, each in rates.items():
        row = {
            "suite": "fits",
            "case": case.name,
            "target": target,
            "steps": found[name][1],
            "number": number,
            "provider": name,
            "fits_per_s": statistics.median(each),
            "spread": [min(each), max(each)],
            "psnr": float(np.median(found[name][0])),
            "machine": machine(),
        }
        append(ROWS, row)
        print(f"{case.name} | {target or case.steps} | N {number} | {name}: {row['fits_per_s']:.2f} fits/s", flush=True)


def _gate(found: dict[str, providers.Reached], target: float | None) -> None:
    """Raise ParityError unless every signal has its target, or all providers the same PSNR after the same steps."""
    truth = float(np.median(found[LOOP if LOOP in found else next(reversed(found))][0]))
    for name, (psnr, _) in found.items():
        if target is not None and psnr.min() < target - 1e-3:
            raise ParityError(f"{name}: {psnr.min():.2f} dB, and the target is {target}; no speed is reported")
        if target is None and not abs(float(np.median(psnr)) - truth) <= GATE_DB:
            raise ParityError(f"{name}: median {np.median(psnr):.2f} dB and others {truth:.2f}; no speed is reported")


def fits_table(rows: list[dict[str, Any]]) -> list[str]:
    """A line per case, target and provider; a column per N."""
    rows = [r for r in rows if r["suite"] == "fits"]
    latest = {(r["case"], r["target"], r["provider"], r["number"]): r for r in rows}
    numbers = sorted({r["number"] for r in rows})
    lines = [f"| until | {' | '.join(f'N = {n}' for n in numbers)} | steps |", "|---" * (2 + len(numbers)) + "|"]
    for case in CASES:
        for target in TARGETS:
            names = [n for n in PROVIDERS if any(k[:3] == (case, target, n) for k in latest)]
            if names:
                what = "steps fixed" if target is None else f"{target:.0f} dB"
                lines.append(f"| **{case}, {what}** |" + " |" * (1 + len(numbers)))
            for name in names:
                own = [latest.get((case, target, name, n)) for n in numbers]
                cells = ["" if r is None else f"{r['fits_per_s']:.3g}" for r in own]
                steps = next(r["steps"] for r in reversed(own) if r is not None)
                lines.append(f"| {name} | {' | '.join(cells)} | {steps:.0f} |")
    return lines


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(
        prog="python -m strainer_fast.benchmarks.datasets", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("what", choices=("fits", "durability", "split", "parallel", "ten-thousand", "write"))
    parser.add_argument("--cases", nargs="+", default=[""], help="only those whose name has one of these in it")
    parser.add_argument("--numbers", nargs="+", type=int, help="only these N")
    asked = parser.parse_args()
    if asked.what == "write":
        rows = read_rows(ROWS)
        text = replace_between(DOCUMENT.read_text(), "fits per second", fits_table(rows))
        for suite in runs.SUITES:
            text = replace_between(text, suite, runs.table(suite, rows))
        DOCUMENT.write_text(text)
        print(f"wrote {DOCUMENT.relative_to(ROOT)}")
    elif asked.what == "fits":
        for case in [c for c in CASES.values() if any(part in c.name for part in asked.cases)]:
            for number in [n for n in case.numbers if not asked.numbers or n in asked.numbers]:
                for target in TARGETS:
                    measure(case, number, target)
    elif asked.what == "ten-thousand":
        print(json.dumps(runs.ten_thousand(), indent=1))
    else:
        for row in runs.SUITES[asked.what]():
            append(ROWS, row | {"suite": asked.what, "machine": machine()})
            print(row, flush=True)


if __name__ == "__main__":
    main()

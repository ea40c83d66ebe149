"""What whole runs of `fit_dataset` cost and survive."""

from __future__ import annotations

import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import strainer_fast as sf
from strainer_fast.benchmarks.datasets.cases import CASES, digits
from strainer_fast.datasets import writer

ROUNDS = 7
NUMBER = 2000
"""Digits of a run."""
NETWORK = CASES["28x28 digits, 3x32"].network


def _fit(folder: Path, number: int = NUMBER, **more: Any) -> sf.FittedDataset:
    given: dict[str, Any] = {"architecture": NETWORK, "target_psnr": 35.0} | more
    return sf.fit_dataset(digits()[:number], folder, "shared", "small", **given)


class _Nowhere(writer.Writer):
    """Keeps nothing."""

    def append(self, rows: Any, weights: Any) -> None:
        """Drop them."""


def durability() -> Iterator[dict[str, Any]]:
    """Seconds of runs that keep every network on the disk, and of runs that keep none, in turn."""
    seconds: dict[str, list[float]] = {"kept": [], "dropped": []}
    for turn in range(ROUNDS + 1):
        for name in seconds:
            folder = Path(tempfile.mkdtemp(prefix="durability"))
            real = writer.Writer
            writer.Writer = real if name == "kept" else _Nowhere  # type: ignore[misc]
            begin = time.perf_counter()
            try:
                _fit(folder)
            finally:
                writer.Writer = real  # type: ignore[misc]
            if turn:
                seconds[name].append(time.perf_counter() - begin)
            shutil.rmtree(folder)
    ratios = [a / b for a, b in zip(seconds["kept"], seconds["dropped"], strict=True)]
    yield {
        "what": f"{NUMBER} digits, 3x32, 35 dB",
        "kept_s": statistics.median(seconds["kept"]),
        "dropped_s": statistics.median(seconds["dropped"]),
        "overhead": statistics.median(ratios) - 1,
        "spread": [min(ratios) - 1, max(ratios) - 1],
    }


def split() -> Iterator[dict[str, Any]]:
    """Fits per second of one process with two threads and of two with one, in turn; starts of processes not counted."""
    for what, number, arguments in (
        ("digits, 3x32, native whole fits", 1000, "recipe='small', target_psnr=35.0, init='shared'"),
        ("digits, 3x32, stacks of K-FAC", 128, "recipe='fast', target_psnr=35.0, init='shared'"),
        ("178x178 slices, 5x256, K-FAC", 2, "recipe='fast', target_psnr=35.0, init='shared'"),
    ):
        rates: dict[int, list[float]] = {1: [], 2: []}
        for _ in range(3):
            for processes, each in rates.items():
                each.append(_rate(processes, 2 // processes, number, what, arguments))
        for processes, each in rates.items():
            yield {
                "what": what,
                "processes": processes,
                "threads": 2 // processes,
                "fits_per_s": statistics.median(each),
                "spread": [min(each), max(each)],
            }


_CHILD = """
import sys, time, torch, tempfile, numpy as np
import strainer_fast as sf
from strainer_fast.benchmarks.datasets.cases import CASES, digits, slices
part, parts, threads, number = map(int, sys.argv[1:5])
torch.set_num_threads(threads)
images = slices() if "slices" in sys.argv[5] else digits()
network = sf.Architecture() if "slices" in sys.argv[5] else sf.Architecture(32, 4, 3)
sf.fit(images[:1], "shared", sf.recipe("fast", steps=1), architecture=network)
with tempfile.TemporaryDirectory() as folder:
    print("ready", flush=True)
    sys.stdin.readline()
    begin = time.perf_counter()
    sf.fit_dataset(images[:number], folder, architecture=network, shard=(part, parts), {arguments})
    print(time.perf_counter() - begin, flush=True)
"""


def _rate(processes: int, threads: int, number: int, what: str, arguments: str) -> float:
    code = _CHILD.replace("{arguments}", arguments)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, *map(str, (i, processes, threads, number)), what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    for child in children:
        assert child.stdout and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin
        child.stdin.write("\n")
        child.stdin.flush()
    slowest = max(float(child.stdout.readline()) for child in children if child.stdout)
    for child in children:
        child.communicate()
    return number / slowest


def parallel() -> Iterator[dict[str, Any]]:
    """Fits per second with so many signals at a time, in turn; "auto" is what fit_dataset takes by itself."""
    for name, recipe, number, sizes in (
        ("28x28 digits, 3x32", "small", 1024, (2, 16, 256, 1024)),
        ("28x28 digits, 3x32", "fast", 332, (1, 8, 32, 332)),
        ("32x32 colour crops, 3x64", "fast", 128, (1, 8, 16, 128)),
    ):
        case = CASES[name]
        rates: dict[str, list[float]] = {each: [] for each in ("auto", *map(str, sizes))}
        for _ in range(3):
            for size, each in rates.items():
                with tempfile.TemporaryDirectory() as folder:
                    begin = time.perf_counter()
                    sf.fit_dataset(
                        case.images()[:number],
                        folder,
                        "shared",
                        recipe,
                        architecture=case.network,
                        target_psnr=30.0,
                        num_parallel=size if size == "auto" else int(size),
                    )
                    each.append(number / (time.perf_counter() - begin))
        for size, each in rates.items():
            yield {
                "what": f"{name}, {recipe}",
                "num_parallel": size,
                "fits_per_s": statistics.median(each),
                "spread": [min(each), max(each)],
            }


SUITES: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    "durability": durability,
    "split": split,
    "parallel": parallel,
}


def ten_thousand(kills: int = 3) -> dict[str, Any]:
    """Fit 10,000 digits (5,000 and their mirror images) in a process that is killed at random moments, and verify."""
    folder = Path(tempfile.mkdtemp(prefix="ten-thousand"))
    source = folder / "digits.npy"
    np.save(source, digits())
    out = folder / "networks"
    command = [str(Path(sys.executable).with_name("strainer-fast")), "fit-dataset", str(source), "--out", str(out)]
    command += ["--init", "shared", "--recipe", "small", "--target-psnr", "35", "--hidden-features", "32"]
    command += ["--num-layers", "4", "--resume", "--quiet"]
    chance, finished = random.Random(), []
    begin = time.perf_counter()
    try:
        for _ in range(kills):
            child = subprocess.Popen(command)
            time.sleep(5 + 5 * chance.random())
            if child.poll() is not None:
                raise RuntimeError("the run was over before it could be killed")
            child.send_signal(signal.SIGKILL)
            child.wait()
            finished.append(_on_disk(out))
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - begin
        dataset = sf.FittedDataset(out)
        verification = sf.datasets.verify(dataset)
        steps = [row.signal.steps for row in dataset.rows()]
        if len(dataset) != len(digits()) or not verification.passed or finished != sorted(finished):
            raise RuntimeError(f"{len(dataset)} networks, verification {verification}")
    finally:
        shutil.rmtree(folder)
    return {
        "networks": len(dataset),
        "on the disk after each kill": finished,
        "seconds with restarts": seconds,
        "verified": verification.checked,
        "same bits": verification.same_bits,
        "median steps": float(np.median(steps)),
        "threads": torch.get_num_threads(),
    }


def _on_disk(out: Path) -> int:
    """Networks that a killed run has left."""
    from strainer_fast.datasets import folder as files
    from strainer_fast.datasets.journal import Journal

    kept = sum(len(files.read_rows(path)) for path in files.shard_paths(out))
    for path in (out / files.SHARDS).glob(f"*{files.PART}"):
        with tempfile.TemporaryDirectory() as copy:
            kept += len(Journal(Path(shutil.copy(path, copy))).rows)
    return kept


def table(suite: str, rows: list[dict[str, Any]]) -> list[str]:
    """The last rows of a suite."""
    latest = {(r["what"], r.get("processes"), r.get("num_parallel")): r for r in rows if r["suite"] == suite}.values()
    if suite == "durability":
        lines = ["| run | with files | without | overhead, median of pairs |", "|---|---|---|---|"]
        for r in latest:
            span = f"{100 * r['spread'][0]:.1f} to {100 * r['spread'][1]:.1f}"
            lines.append(
                f"| {r['what']} | {r['kept_s']:.2f} s | {r['dropped_s']:.2f} s | {100 * r['overhead']:.1f} % ({span}) |"
            )
        return lines
    if suite == "parallel":
        lines = ["| fits | at a time | fits/s |", "|---|---|---|"]
        for r in latest:
            span = f"{r['spread'][0]:.3g} to {r['spread'][1]:.3g}"
            lines.append(f"| {r['what']} | {r['num_parallel']} | {r['fits_per_s']:.3g} ({span}) |")
        return lines
    lines = ["| fits | processes x threads | fits/s |", "|---|---|---|"]
    for r in latest:
        span = f"{r['spread'][0]:.3g} to {r['spread'][1]:.3g}"
        lines.append(f"| {r['what']} | {r['processes']} x {r['threads']} | {r['fits_per_s']:.3g} ({span}) |")
    return lines

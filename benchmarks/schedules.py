"""How the one-pass sweep might be scheduled on a CPU, measured: `python -m strainer_fast.benchmarks.schedules`.

`--profile` prints instead where the time of a step goes, by PyTorch operation and shape; `--native` the native engine's
tile sizes at widths 64, 256 and 512; `--threads` the engine on PyTorch's threads against threads started for each call.

Variants, interleaved: threaded products over tiles of several sizes (what `ops.tiled` does), and one tile per thread
with single-threaded products (Python threads that sweep a part of the points each; PyTorch's calls release the GIL).
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from strainer_fast.benchmarks.cases import CASES, Case, Problem, Result, named, truth_of
from strainer_fast.benchmarks.harness import ParityError, judge, machine, sgemm
from strainer_fast.benchmarks.step_peers import Step, fused, ours
from strainer_fast.kernels import cpu
from strainer_fast.kernels.cpu import loading
from strainer_fast.ops import native, tiled

TILES = (256, 512, 1024, 2048, 4096, 8192)
TILES_PER_THREAD = (128, 256, 512)
NATIVE_TILES = (42, 70, 98, 140, 224, 336)


def threaded_products(problem: Problem, tile: int) -> Step:
    """All threads share the products of one tile."""
    p = problem
    data = [t.detach() for t in p.parameters]

    def step() -> Result:
        swept = tiled.sweep(p.points, p.values, data, p.omegas, [True] * len(data), tile=tile)
        return swept.losses, [g for g in swept.gradients if g is not None]

    return step


def tile_per_thread(problem: Problem, tile: int, pool: ThreadPoolExecutor, threads: int) -> Step:
    """Each thread sweeps its own part of the points; the parts are then summed in order."""
    p = problem
    data = [t.detach() for t in p.parameters]
    parts = list(zip(p.points.chunk(threads), p.values.chunk(threads, dim=1), strict=True))

    def part(points: torch.Tensor, values: torch.Tensor) -> Result:
        share = torch.full((values.shape[0],), points.shape[0] / p.points.shape[0])
        swept = tiled.sweep(points, values, data, p.omegas, [True] * len(data), signal_weights=share, tile=tile)
        return swept.losses * share, [g for g in swept.gradients if g is not None]

    def step() -> Result:
        results = list(pool.map(part, *zip(*parts, strict=True)))
        gradients = [sum(g[1:], g[0]) for g in zip(*(g for _, g in results), strict=True)]
        losses = torch.stack([losses for losses, _ in results]).sum(0)
        return losses, gradients

    return step


def use_one_thread(_: int) -> None:
    """Once in every thread of the pool; the pause keeps one from taking another's turn."""
    torch.set_num_threads(1)
    time.sleep(0.1)


def measure(steps: dict[str, Step], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, all in turn every round."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def profile(step: Step, steps: int = 5) -> None:
    """Milliseconds a step of the operations that take longest."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as recorded:
        for _ in range(steps):
            step()
    events = recorded.key_averages(group_by_input_shape=True)
    for event in sorted(events, key=lambda e: -e.self_cpu_time_total)[:12]:
        shapes = [s for s in event.input_shapes if s]
        print(f"{event.self_cpu_time_total / steps / 1e3:8.1f} ms  {event.count // steps:4} x {event.key} {shapes}")


def native_tiles(rounds: int) -> None:
    """One line per width and number of threads: milliseconds by tile."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for width in (64, 256, 512):
            p = Problem.of(Case("", 178, width, 6))
            data = [t.detach() for t in p.parameters]
            everything = [True] * len(data)
            steps: dict[str, Step] = {}
            for tile in NATIVE_TILES:
                sweep = functools.partial(native.sweep, p.points, p.values, data, p.omegas, everything, tile=tile)
                steps[f"{tile}"] = lambda sweep=sweep: (sweep().losses, [])  # type: ignore[misc]
            found = measure(steps, rounds)
            by_tile = ", ".join(f"{tile} points {milliseconds:.1f} ms" for tile, milliseconds in found.items())
            print(f"width {width}, {threads} threads: {by_tile}")


def native_threads(rounds: int) -> None:
    """One line per case of two threads: milliseconds on either kind of thread, a PyTorch operation before each."""
    library, pool = cpu.library(), loading._pytorchs_pool()
    if library is None or pool is None:
        raise SystemExit(f"native engine: {cpu.missing() or 'PyTorch runs on no libgomp here'}")
    kinds = {"PyTorch's": ctypes.cast(pool.GOMP_parallel, ctypes.c_void_p), "started": None}
    torch.set_num_threads(2)
    other = torch.rand(1000, 1000)
    for case in CASES:
        if case.threads == 2:
            step = ours(Problem.of(case))

            def on(kind: ctypes.c_void_p | None, step: Step = step) -> Result:
                library.sf_use_pool(kind)
                return step()

            seconds: dict[str, list[float]] = {name: [] for name in kinds}
            for _ in range(rounds):
                for name, kind in kinds.items():
                    (other @ other).sin_()
                    begin = time.perf_counter()
                    on(kind)
                    seconds[name].append(time.perf_counter() - begin)
            found = ", ".join(f"{name} {1e3 * statistics.median(times):.1f} ms" for name, times in seconds.items())
            print(f"{case.name}: {found}")
    library.sf_use_pool(kinds["PyTorch's"])


def main() -> None:
    """Prints one line per variant for the 178x178 case on two threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--native", action="store_true")
    parser.add_argument("--threads", action="store_true")
    arguments = parser.parse_args()
    if arguments.threads:
        native_threads(arguments.rounds)
        return
    if arguments.native:
        native_tiles(arguments.rounds)
        return
    case = next(c for c in CASES if c.name == "178x178, 5x256")
    torch.set_num_threads(case.threads)
    problem = Problem.of(case)
    truth = named(truth_of(problem))

    def check_parity(name: str, result: Result) -> None:
        found = judge(named(result), truth)
        if not found["right"]:
            raise ParityError(f"{name}: {found['where']} off by {found['error']:.1e}")

    shared: dict[str, Step] = {f"threaded products, tiles of {t}": threaded_products(problem, t) for t in TILES}
    shared["autograd eager"] = fused(problem)
    for name, step in shared.items():
        check_parity(name, step())
    print(f"{machine()['cpu']}, torch {torch.__version__}; sgemm {sgemm()():.0f} GFLOP/s")
    if arguments.profile:
        profile(threaded_products(problem, 1024))
        return
    found = measure(shared, arguments.rounds)
    # The number of threads of a product is a setting of the process, so these have a turn of their own.
    with ThreadPoolExecutor(case.threads) as pool:
        list(pool.map(use_one_thread, range(case.threads)))
        alone: dict[str, Step] = {
            f"a tile of {t} per thread": tile_per_thread(problem, t, pool, case.threads) for t in TILES_PER_THREAD
        }
        for name, step in alone.items():
            check_parity(name, step())
        found |= measure(alone, arguments.rounds)
    for name, milliseconds in sorted(found.items(), key=lambda item: item[1]):
        print(f"{milliseconds:8.1f} ms  {case.flops / milliseconds / 1e6:5.0f} GFLOP/s  {name}")


if __name__ == "__main__":
    main()

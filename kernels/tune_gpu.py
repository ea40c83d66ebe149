"""The tuner's clock on a GPU: kernels compiled ahead by other processes, compared with the row's own, timed in graphs.

A launch from Python takes longer than most kernels here run, so each candidate is recorded REPEATS times into a CUDA
graph and the graph's replays are timed, side by side with the others'.
"""

import multiprocessing
import signal
import statistics
import sys
import zlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .capture import Launch, capture, table
from .cases import row_cases, row_name, row_precisions
from .chip import Chip
from .table_file import same_place
from .tiles import Row

ROUNDS, REPEATS = 20, 20
"""Medians are over ROUNDS; in each, every graph of REPEATS launches is replayed once."""

COMPILE_LIMIT = 120.0
"""Seconds that are waited for a kernel to compile."""

SPREAD = 0.125
"""Standard deviation of the numbers that kernels are measured with: no half precision overflows over five layers."""

UNIT = {"tf32x3": 2.0**-21, "tf32": 2.0**-11, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""What rounding an operand costs at most; 2^-24 in other precisions."""

STICKY = ("illegal", "misaligned", "launch failure", "device-side assert")
"""In words of errors after which the CUDA context is of no more use."""

Replay = Callable[[], None]
Stopwatch = Callable[[Replay], float]
"""Seconds that a call takes."""


class DeviceLost(RuntimeError):
    """A launch broke the CUDA context: nothing can be measured in this process any more."""


class Runnable(Protocol):
    """What is used of a capture.Launch."""

    @property
    def tensors(self) -> dict[str, Tensor]: ...

    def run(self) -> None: ...


def launch_of(row: Row, rows: Sequence[Row], chip: Chip, device: str) -> Launch:
    """The launch of a row's representative layer with the row's tiles; the other rows are the table's."""
    (case,) = row_cases((row,))
    with table(row if same_place(row, r) else r for r in rows), capture(chip, device) as launches:
        case.run(row_precisions(row)[0])
    return launches[0]


def fill(launch: Runnable) -> None:
    """The same numbers for the same argument, whatever the tiles: each has a generator of its own."""
    for name, tensor in launch.tensors.items():
        if tensor.is_floating_point():
            memory = tensor if tensor._base is None else tensor._base  # a hidden layer is a view of all of them
            generator = torch.Generator(tensor.device).manual_seed(zlib.crc32(name.encode()))
            memory.normal_(std=SPREAD, generator=generator)


def results(launch: Runnable) -> dict[str, Tensor]:
    """What a launch writes, in float64 and summed over the first axis.

    That axis is the one network of a row's case, or the shares of partial sums: their number depends on the tiles.
    """
    fill(launch)
    before = {name: tensor.clone() for name, tensor in launch.tensors.items() if not name.startswith("scratch")}
    launch.run()
    tensors = launch.tensors
    return {name: tensors[name].double().sum(0) for name, old in before.items() if not torch.equal(tensors[name], old)}


def difference(got: dict[str, Tensor], want: dict[str, Tensor], precision: str) -> str:
    """In which way two results are not the same within the precision; empty where they are."""
    if set(got) != set(want):
        return f"writes {sorted(got)}, expected {sorted(want)}"
    bound = 8 * UNIT.get(precision, 2.0**-24) + 1e-5
    for name, tensor in want.items():
        if got[name].shape != tensor.shape:
            return f"{name}: shape {list(got[name].shape)}, expected {list(tensor.shape)}"
        error = float((got[name] - tensor).norm() / tensor.norm().clamp_min(1e-30))
        if not error <= bound:  # NaN is an error as well
            return f"{name}: off by {error:.1e} of its norm, expected at most {bound:.1e}"
    return ""


def interleaved(replays: Sequence[Replay], stopwatch: Stopwatch, rounds: int = ROUNDS) -> list[float]:
    """Medians of each, measured in turns, so that a change of clocks meets all alike; each turn begins with another."""
    samples: list[list[float]] = [[] for _ in replays]
    for turn in range(rounds):
        for offset in range(len(replays)):
            index = (turn + offset) % len(replays)
            samples[index].append(stopwatch(replays[index]))
    return [statistics.median(s) for s in samples]


class _NoDriver:
    """For Triton in a process that compiles for a chip and launches nothing: its cache is keyed as on the GPU."""

    def __init__(self, chip: Chip) -> None:
        self.chip = chip

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.chip.target, self.chip.arch, 64 if self.chip.target == "hip" else 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_ahead(row: Row, rows: Sequence[Row], chip: Chip) -> str:
    """In a process without a GPU's driver: put a row's kernel into Triton's cache on disk.

    Returns what the compiler said against it, or nothing.
    """
    from triton.runtime import driver

    driver.set_active(_NoDriver(chip))
    try:
        launch = launch_of(row, rows, chip, "meta")
        launch.function.warmup(**launch.arguments, grid=launch.grid, **launch.options)
    except Exception as error:  # tiles that do not compile are a result: others go on
        return _words(error)
    return ""


class GpuClock:
    """Seconds of rows' kernels on this GPU; a context manager that ends its processes.

    Args:
        rows: the table; a candidate takes its row's place in it.
        chip: of the GPU.
        workers: processes that compile.
        device: of the tensors.
    """

    def __init__(self, rows: Sequence[Row], chip: Chip, workers: int, device: str = "cuda") -> None:
        self.rows, self.chip, self.device = tuple(rows), chip, device
        # A forked child would inherit PyTorch's threads as locks that nobody releases.
        ignore = (signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
        self.pool = multiprocessing.get_context("spawn").Pool(workers, signal.signal, ignore)
        self.compiling: dict[Row, Any] = {}

    def __enter__(self) -> "GpuClock":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.terminate()
        self.pool.join()

    def compile(self, choices: Sequence[Row]) -> None:
        """Have these compiled meanwhile."""
        for choice in choices:
            if choice not in self.compiling:
                arguments = (choice, self.rows, self.chip)
                self.compiling[choice] = self.pool.apply_async(compile_ahead, arguments)

    def seconds(self, choices: Sequence[Row]) -> list[float]:
        """Of one launch of each; infinity for those that cannot run, or whose result is not the first one's.

        Raises DeviceLost after a fault that ends the CUDA context.
        """
        self.compile(choices)
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        launches, want = [], None  # launches hold the tensors that graphs read
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        for index, choice in enumerate(choices):
            problem = self._compiled(choice)
            try:
                if not problem:
                    launch = launch_of(choice, self.rows, self.chip, self.device)
                    got = results(launch)
                    want = want or got
                    problem = difference(got, want, row_precisions(choice)[0])
                if not problem:
                    graphs[index] = _recorded(launch, stream)
                    launches.append(launch)
            except Exception as error:  # too much shared memory, or what else shows only here
                problem = _words(error)
                if any(sign in problem for sign in STICKY):
                    raise DeviceLost(f"{row_name(choice)}: {choice.tiles}: {problem}") from error
            if problem:
                print(f"  {choice.tiles} skipped: {problem}", file=sys.stderr, flush=True)
        able = list(graphs)
        with torch.cuda.stream(stream):
            medians = interleaved([graphs[index].replay for index in able], _events)
        found = {index: median / REPEATS for index, median in zip(able, medians, strict=True)}
        return [found.get(index, float("inf")) for index in range(len(choices))]

    def _compiled(self, choice: Row) -> str:
        """What is wrong with a compiled candidate, or nothing."""
        try:
            return str(self.compiling[choice].get(COMPILE_LIMIT))
        except multiprocessing.TimeoutError:
            return f"not compiled within {COMPILE_LIMIT:.0f} s"


def _recorded(launch: Launch, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """REPEATS launches as a graph; torch.cuda.graph would also empty the allocator's cache each time."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin()
        try:
            for _ in range(REPEATS):
                launch.run()
        finally:
            graph.capture_end()
    return graph


def _events(replay: Replay) -> float:
    """Seconds on the current stream."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _words(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"

"""What benchmarks/gpu.py measures steps by: the clock, the truth, what is equal, ways to do a step.

Nothing here needs a GPU but `cuda_clock`, `cuda_record` and the peers in a CUDA graph: tests pass their own clock.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.benchmarks.cases import CHUNK, Case, Problem, named, truth_of
from strainer_fast.benchmarks.harness import (
    MOST_REPEATS,
    SAMPLE,
    Call,
    Named,
    Row,
    Rows,
    Seconds,
    attempt,
    summary,
)

LEARNING_RATE, STEPS = 1e-4, 4
"""Of the steps that are compared: a CUDA graph replays from the second on."""

ROUNDS = 20
"""Interleaved."""

GRAPHED = 20
"""Launches of one kernel in a CUDA graph, when it is timed on its own."""

Clock = Callable[[Sequence[Call]], list[Seconds]]
"""Seconds of each of some calls, measured in turn, round by round."""


def cuda_clock(calls: Sequence[Call], rounds: int = ROUNDS) -> list[Seconds]:
    """By CUDA events, interleaved so that a change of the GPU's clocks meets every call alike."""

    def elapsed(call: Call, repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3 / repeats

    for call in calls:
        call()
    torch.cuda.synchronize()
    repeats = [max(1, min(MOST_REPEATS, math.ceil(SAMPLE / max(elapsed(call, 1), 1e-6)))) for call in calls]
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for i, call in enumerate(calls):
            samples[i].append(elapsed(call, repeats[i]))
    return [summary(s) for s in samples]


def cuda_record(call: Call, repeats: int) -> Call:
    """A CUDA graph of so many calls: starting a kernel from Python takes longer than most kernels here run."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()

    def replay(keep: Call = call) -> None:  # its tensors have to outlive the graph
        graph.replay()

    return replay


@dataclass(frozen=True)
class Bench:
    """Where and by what clock; what a machine without a GPU has to replace."""

    device: str = "cuda"
    clock: Clock = cuda_clock
    record: Callable[[Call, int], Call] = cuda_record

    def peak(self, run: Callable[[], Row]) -> Row:
        """What `run` gives, and the most memory it took above what was there, in MB."""
        if self.device != "cuda":
            return run()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return run() | {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}


def timed(rows: Rows, calls: Sequence[Callable[[], object]], bench: Bench, share: int = 1) -> None:
    """Measure calls in turn and put milliseconds into their rows; or why it could not be done."""
    found = attempt(lambda: {"seconds": bench.clock(calls)})
    if "refused" in found:
        for row in rows:
            row.update(found)
        return
    for row, seconds in zip(rows, found["seconds"], strict=True):
        row.update(zip(("median_ms", "p20_ms", "p80_ms"), (1e3 * s / share for s in seconds), strict=True))


@dataclass(frozen=True)
class Truth:
    """A problem's results in float64."""

    first: Named  # losses and gradients of the parameters as they are
    losses: Named  # before each of STEPS steps of Adam
    values: Named


def problem_on(case: Case, device: str) -> Problem:
    """A case's tensors there; parameters are leaves."""
    return Problem.of(case, device)


def leaves(problem: Problem) -> list[Tensor]:
    """Fresh copies of the parameters."""
    return [p.detach().clone().requires_grad_() for p in problem.parameters]


def truth(problem: Problem) -> Truth:
    """By autograd and Adam in float64, a part of the points at a time."""
    parameters = [p.detach().double() for p in problem.parameters]
    adam = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    results = []
    for _ in range(STEPS):
        results.append(truth_of(replace(problem, parameters=parameters)))
        for p, g in zip(parameters, results[-1][1], strict=True):
            p.grad = g.clone()
        adam.step()
    start = [p.detach().double() for p in problem.parameters]
    chunks = torch.split(problem.points.double(), CHUNK)
    values = torch.cat([reference.siren(c, start[::2], start[1::2], problem.omegas) for c in chunks], dim=-2)
    losses = {f"losses of step {k}": result[0] for k, result in enumerate(results)}
    return Truth(named(results[0]), losses, {"values": values})


@contextmanager
def matmul(precision: str) -> Iterator[None]:
    """Within, PyTorch's own float32 products are rounded to tf32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class Stepping:
    """A training step that goes on from where it is: it returns the losses [N] before the update."""

    step: Callable[[], Tensor]
    gradients: Callable[[], Sequence[Tensor]]  # those of the last step


def triton_stepper(problem: Problem, precision: str) -> Any:
    """The TritonStepper of fits and pre-training."""
    from strainer_fast.fitting.optim import Adam
    from strainer_fast.fitting.steppers import make_stepper

    parameters, p = leaves(problem), problem
    independent = parameters[0].ndim == 3
    recipe = sf.recipe("paper", learning_rate=LEARNING_RATE, precision=precision)
    adam = Adam(parameters, recipe, len(p.values) if independent else None)
    how: dict[str, Any] = {"implementation": "triton", "precision": precision, "independent": independent, "keep": True}
    return make_stepper(p.points, p.values, parameters, p.omegas, adam, **how)


def ours(problem: Problem, precision: str) -> Stepping:
    """Gradients and Adam by the Triton kernels, in CUDA graphs from the second step on."""
    stepper = triton_stepper(problem, precision)

    def step() -> Tensor:
        losses: Tensor = stepper.evaluate(0, True)
        stepper.update()
        return losses

    def gradients() -> list[Tensor]:
        each = stepper.pipeline.parameters(stepper.gradients)
        return [g.reshape(p.shape) for g, p in zip(each, stepper.parameters, strict=True)]

    return Stepping(step, gradients)


def pytorch(problem: Problem, precision: str, *, compiled: str | None = None, graph: bool = False) -> Stepping:
    """Autograd and PyTorch's fused Adam; forward and loss compiled in a mode, the whole step in a CUDA graph."""
    parameters, omegas = leaves(problem), problem.omegas
    adam = torch.optim.Adam(parameters, lr=LEARNING_RATE, fused=True, capturable=graph)

    def losses_of(points: Tensor, values: Tensor, *parameters: Tensor) -> Tensor:
        return reference.mse(reference.siren(points, parameters[::2], parameters[1::2], omegas), values)

    forward = losses_of if compiled is None else torch.compile(losses_of, fullgraph=True, mode=compiled)

    def step() -> Tensor:
        with matmul(precision):
            losses = forward(problem.points, problem.values, *parameters)
            # Contiguous: the fused kernel walks through memory, and batched products' gradients come transposed.
            for p, g in zip(parameters, torch.autograd.grad(losses.sum(), parameters), strict=True):
                p.grad = g.contiguous()
            adam.step()
        return losses.detach()

    def gradients() -> list[Tensor]:
        return [p.grad for p in parameters if p.grad is not None]

    return Stepping(_captured(step, parameters, adam) if graph else step, gradients)


def _captured(step: Callable[[], Tensor], parameters: list[Tensor], adam: torch.optim.Adam) -> Callable[[], Tensor]:
    """The step in a CUDA graph, parameters and optimiser as they were before it was recorded."""
    before = [p.detach().clone() for p in parameters]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        losses = step()
    with torch.no_grad():
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old)
        for state in adam.state.values():
            for tensor in state.values():
                tensor.zero_()

    def replay(keep: object = adam) -> Tensor:  # its moments have to outlive the graph
        graph.replay()
        return losses

    return replay


@dataclass(frozen=True)
class Provider:
    """A way to do a step; `precision` is None for ours, which has all."""

    name: str
    build: Callable[[Problem, str], Stepping]
    precision: str | None = None


def providers(case: Case, quick: bool) -> list[Provider]:
    """Ours first; torch.compile is left out of large cases and of --quick, for it takes half a minute each."""
    found = [Provider("strainer_fast", ours)]
    ways: dict[str, dict[str, Any]] = {"autograd": {}, "autograd, CUDA graph": {"graph": True}}
    if case.table == "step" and not quick:
        ways |= {
            "torch.compile": {"compiled": "default"},
            "torch.compile, CUDA graph": {"compiled": "default", "graph": True},
            # Its own CUDA graphs would leave out the optimiser.
            "torch.compile max-autotune, CUDA graph": {"compiled": "max-autotune-no-cudagraphs", "graph": True},
        }
    for name, how in ways.items():
        for precision in ("fp32", "tf32"):

            def build(problem: Problem, precision: str, how: dict[str, Any] = how) -> Stepping:
                return pytorch(problem, precision, **how)

            found.append(Provider(f"{name} + fused Adam", build, precision))
    return found

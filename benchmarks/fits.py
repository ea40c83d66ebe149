"""Whole fits of small networks, ours and the ways people do it: N signals in, N losses after S Adam steps out."""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.fitting.optim import Adam
from strainer_fast.ops import losses_and_gradients
from strainer_fast.ops.fit_small import FitState, fit_small

Fit = Callable[[int], Tensor]
"""From a number of signals to their mean squared errors [N] at the end."""


@dataclass(frozen=True)
class FitCase:
    """N networks fitted to N small images."""

    name: str
    size: int
    width: int
    num_layers: int
    channels: int
    steps: int
    learning_rate: float = 1e-4
    stack: int = 64  # fits in a round of those that stack

    def data(self, num: int) -> tuple[Tensor, Tensor, list[Tensor], tuple[float, ...]]:
        """Points, values, parameters by SIREN's rules, omegas: real images, shifted where more are asked for."""
        images = _images(self.size)
        stack = sf.BatchedSiren(num, 2, self.width, self.num_layers, self.channels)
        stack.reset_parameters(torch.Generator().manual_seed(0))
        chosen = [images[n % len(images)].values.roll(n // len(images), 0)[..., : self.channels] for n in range(num)]
        values = torch.stack(chosen).reshape(num, -1, self.channels)
        return sf.signals.grid((self.size, self.size)), values, [p.detach() for p in stack.parameters()], stack.omegas


@functools.cache
def _images(size: int) -> list[sf.Signal]:
    """Decoded once: it is not what is measured."""
    return sf.signals.samples("photos", size=size)


FIT_CASES = (
    FitCase("2-32x3-1, 28x28, 500 Adam steps", 28, 32, 4, 1, 500),
    FitCase("2-64x3-3, 32x32, 500 Adam steps", 32, 64, 4, 3, 500, stack=16),
)


def ours(case: FitCase) -> Fit:
    """`ops.fit_small`: what `strainer_fast.fit` runs for such networks."""

    def run(num: int) -> Tensor:
        points, values, parameters, omegas = case.data(num)
        state = FitState.fresh(parameters, case.steps, False)
        rates = torch.full((case.steps,), case.learning_rate)
        options: dict[str, Any] = {"betas": (0.9, 0.999), "eps": 1e-8, "check_every": 10}
        fit_small(points, values, state, omegas, until=case.steps, learning_rates=rates, **options)
        return state.mse[:, -1]

    return run


def python_loop(case: FitCase) -> Fit:
    """One network after another: autograd and torch.optim.Adam (fused)."""

    def run(num: int) -> Tensor:
        points, values, parameters, omegas = case.data(num)
        losses = []
        for n in range(num):
            network = [p[n].clone().requires_grad_() for p in parameters]
            adam = torch.optim.Adam(network, lr=case.learning_rate, fused=True)
            for _ in range(case.steps):
                adam.zero_grad()
                loss = reference.mse(reference.siren(points, network[::2], network[1::2], omegas), values[n])
                loss.backward()
                adam.step()
            final = reference.siren(points, network[::2], network[1::2], omegas)
            losses.append(reference.mse(final, values[n]).detach())
        return torch.stack(losses)

    return run


def stacked(case: FitCase, how: str) -> Fit:
    """All networks in one stack, one fused Adam: "bmm" and "vmap" with autograd, "tiled" with a backward by hand."""

    def run(num: int) -> Tensor:
        points, values, parameters, omegas = case.data(num)
        adam = Adam(parameters, sf.recipe("paper", learning_rate=case.learning_rate), num)
        leaves = [p.requires_grad_(how == "bmm") for p in parameters]

        def loss(network: list[Tensor], target: Tensor) -> Tensor:
            return reference.mse(reference.siren(points, network[::2], network[1::2], omegas), target)

        each = torch.func.vmap(torch.func.grad_and_value(loss))
        engine = "torch" if how == "bmm" else "tiled"
        for _ in range(case.steps):
            if how == "vmap":
                gradients = each(leaves, values)[0]
            else:
                _, gradients = losses_and_gradients(engine, points, values, leaves, omegas, True)
            adam.update(leaves, gradients)
        return losses_and_gradients("tiled", points, values, [p.detach() for p in leaves], omegas, False)[0]

    return run


class LoopProcesses:
    """Python loops in processes of their own, one thread each, that run at the same time."""

    def __init__(self, case: FitCase, processes: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for _ in range(processes):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, case), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def seconds(self, num: int) -> float:
        """Wall seconds in which each process fits `num` signals."""
        begin = time.perf_counter()
        for pipe in self._pipes:
            pipe.send(num)
        for pipe in self._pipes:
            pipe.recv()
        return time.perf_counter() - begin

    def close(self) -> None:
        """End the processes."""
        for pipe, process in zip(self._pipes, self._processes, strict=True):
            pipe.send(0)
            process.join()


def _serve(pipe: Connection, case: FitCase) -> None:
    torch.set_num_threads(1)
    run = python_loop(case)
    run(1)
    pipe.send(True)
    while num := pipe.recv():
        run(num)
        pipe.send(True)

"""JAX in a process of its own: in ours, its threads and PyTorch's would slow each other down.

Needs the extra `peers`. The child runs a jitted step once per request, and waits for the result each time.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from strainer_fast.benchmarks.cases import Problem, named
from strainer_fast.benchmarks.harness import Running

Array = NDArray[np.float32]


class JaxPeer:
    """One training step by jit of value_and_grad; vmap over the stack for independent networks."""

    def __init__(self, points: Array, values: Array, parameters: Sequence[Array], omegas: Sequence[float]) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, points, values, list(parameters), list(omegas))
        self._process = context.Process(target=_serve, args=arguments, daemon=True)
        self._process.start()
        self.results: list[Array] = self._pipe.recv()  # losses, gradients; compiled by now

    def step(self) -> float:
        """Run once; the seconds it took in the child, waiting for the result included."""
        self._pipe.send("step")
        seconds: float = self._pipe.recv()
        return seconds

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._process.join(10)


def jax_running(problem: Problem) -> Running:
    """The step as the harness wants it."""
    p = problem
    peer = JaxPeer(p.points.numpy(), p.values.numpy(), [t.detach().numpy() for t in p.parameters], p.omegas)

    def first() -> dict[str, torch.Tensor]:
        losses, *gradients = (torch.from_numpy(r) for r in peer.results)
        return named((losses, gradients))

    return Running(peer.step, first, seconds=peer.step, close=peer.close)


def _serve(pipe: Connection, points: Array, values: Array, parameters: list[Array], omegas: list[float]) -> None:
    import jax
    import jax.numpy as jnp

    x, y, weights = jnp.asarray(points), jnp.asarray(values), [jnp.asarray(p) for p in parameters]
    independent = parameters[0].ndim == 3

    def losses_of(ps: list[Any], target: Any) -> Any:
        h = x
        for weight, bias, omega in zip(ps[:-2:2], ps[1:-2:2], omegas, strict=True):
            h = jnp.sin(omega * (h @ weight.T + bias))
        spread = "ph,ch->pc" if independent else "ph,nch->npc"
        prediction = jnp.einsum(spread, h, ps[-2]) + jnp.expand_dims(ps[-1], -2)
        return ((prediction - target) ** 2).mean(axis=(-2, -1))

    def summed(ps: list[Any], target: Any) -> tuple[Any, Any]:
        losses = losses_of(ps, target)
        return losses.sum(), losses

    step = jax.value_and_grad(summed, has_aux=True)
    run = jax.jit(jax.vmap(step) if independent else step)
    (_, losses), gradients = jax.block_until_ready(run(weights, y))
    pipe.send([np.asarray(losses), *(np.asarray(g) for g in gradients)])
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        begin = time.perf_counter()
        jax.block_until_ready(run(weights, y))
        pipe.send(time.perf_counter() - begin)

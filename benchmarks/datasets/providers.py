"""Ways to fit N signals from one start: each from a case and N images to what their networks reached."""

from __future__ import annotations

import multiprocessing
import shutil
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.benchmarks.datasets.cases import Case, Images
from strainer_fast.fitting.optim import Adam
from strainer_fast.ops import losses_and_gradients

Reached = tuple[NDArray[np.float64], float]
"""PSNR of each network [N], and the median number of steps."""
Run = Callable[[Images], Reached]
LIMIT = 2000
"""Steps, where a target has not been reached."""


def _psnr(mse: Tensor) -> NDArray[np.float64]:
    return (-10 * mse.double().log10()).cpu().numpy()


def ours(case: Case, target: float | None, device: str = "cpu") -> Run:
    """`fit_dataset` into a folder: the recipe of the case for a target, else Adam as the others have it."""
    adam = sf.recipe("paper", steps=case.steps, learning_rate=case.rate(None))
    recipe = adam if target is None else sf.recipe(case.own, steps=LIMIT, target_psnr=target)

    def run(images: Images) -> Reached:
        folder = Path(tempfile.mkdtemp(prefix="fits"))
        network = None if case.pretrained else case.network
        try:
            fitted = sf.fit_dataset(images, folder, case.init, recipe, architecture=network, device=device)
            rows = [r.signal for r in fitted.rows()]
        finally:
            shutil.rmtree(folder)
        return np.array([r.psnr for r in rows]), float(np.median([r.steps for r in rows]))

    return run


def loop(case: Case, target: float | None, device: str = "cpu") -> Run:
    """One image after another: autograd and torch.optim.Adam (fused), stopped as soon as a loss says so."""
    start, omegas = case.start()
    bound = 0.0 if target is None else 10 ** (-target / 10)

    def run(images: Images) -> Reached:
        points, losses, steps = sf.signals.grid(images.shape[1:3], device=device), [], []
        for image in images:
            values = torch.from_numpy(image).reshape(-1, image.shape[-1]).to(device)
            network = [p.clone().to(device).requires_grad_() for p in start]
            adam = torch.optim.Adam(network, lr=case.rate(target), fused=True)
            for step in range((case.steps if target is None else LIMIT) + 1):
                adam.zero_grad()
                loss = reference.mse(reference.siren(points, network[::2], network[1::2], omegas), values)
                if step == (case.steps if target is None else LIMIT) or (bound and loss.item() < bound):
                    break
                loss.backward()
                adam.step()
            losses.append(loss.detach())
            steps.append(step)
        return _psnr(torch.stack(losses)), float(np.median(steps))

    return run


def stacked(how: str, case: Case, target: float | None, device: str = "cpu") -> Run:
    """All networks in one stack and one fused Adam, until the slowest is there: "bmm" or "vmap" with autograd."""
    start, omegas = case.start()
    bound = 0.0 if target is None else 10 ** (-target / 10)

    def run(images: Images) -> Reached:
        points = sf.signals.grid(images.shape[1:3], device=device)
        values = torch.from_numpy(images).flatten(1, 2).to(device)
        leaves = [p.expand(len(values), *p.shape).to(device).clone().requires_grad_(how == "bmm") for p in start]
        adam = Adam(leaves, sf.recipe("paper", learning_rate=case.rate(target)), len(values))

        def loss(network: list[Tensor], wanted: Tensor) -> Tensor:
            return reference.mse(reference.siren(points, network[::2], network[1::2], omegas), wanted)

        each = torch.func.vmap(torch.func.grad_and_value(loss))
        last = case.steps if target is None else LIMIT
        for step in range(last + 1):
            if how == "vmap":
                gradients, losses = each(leaves, values)
            else:
                losses, gradients = losses_and_gradients("torch", points, values, leaves, omegas, True)
            if step == last or float(losses.max()) < bound:
                break
            adam.update(leaves, gradients)
        return _psnr(losses.detach()), float(step)

    return run


class Jax:
    """All steps of a stack in one jitted loop of vmapped gradients, in a process of its own; compiled before timing.

    In the style of fit-a-nef, with Adam written out and block_until_ready; the loop ends with the slowest network.
    """

    def __init__(self, case: Case, target: float | None) -> None:
        start, omegas = case.start()
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        settings = (case.steps if target is None else LIMIT, target, case.rate(target))
        parameters = [p.numpy() for p in start]
        self._process = context.Process(target=_serve, args=(theirs, parameters, omegas, *settings), daemon=True)
        self._process.start()

    def __call__(self, images: Images) -> Reached:
        points = sf.signals.grid(images.shape[1:3]).numpy()
        self._pipe.send((points, images.reshape(len(images), -1, images.shape[-1])))
        mse, steps = self._pipe.recv()
        return -10 * np.log10(mse.astype(np.float64)), float(steps)

    def close(self) -> None:
        """End the child."""
        self._pipe.close()
        self._process.join(10)


def _serve(
    pipe: Connection, start: list[Any], omegas: tuple[float, ...], steps: int, target: float | None, rate: float
) -> None:
    import jax
    import jax.numpy as jnp

    bound = 0.0 if target is None else 10 ** (-target / 10)

    def loss_of(ps: list[Any], points: Any, values: Any) -> Any:
        h = points
        for weight, bias, omega in zip(ps[:-2:2], ps[1:-2:2], omegas, strict=True):
            h = jnp.sin(omega * (h @ weight.T + bias))
        return ((h @ ps[-2].T + ps[-1] - values) ** 2).mean()

    each = jax.vmap(jax.value_and_grad(loss_of), (0, None, 0))

    @jax.jit
    def fit(points: Any, values: Any) -> Any:
        ps = [jnp.broadcast_to(p, (values.shape[0], *p.shape)) for p in start]
        zeros = [jnp.zeros_like(p) for p in ps]
        losses, gradients = each(ps, points, values)

        def going(state: Any) -> Any:
            return (state[0] < steps) & (state[4].max() >= bound)

        def body(state: Any) -> Any:
            t, ps, m, v, _, gradients = state
            m = [0.9 * a + 0.1 * g for a, g in zip(m, gradients, strict=True)]
            v = [0.999 * a + 0.001 * g * g for a, g in zip(v, gradients, strict=True)]
            k = t + 1.0
            scale = rate / (1 - 0.9**k), jnp.sqrt(1 - 0.999**k)
            moved = [p - scale[0] * a / (jnp.sqrt(b) / scale[1] + 1e-8) for p, a, b in zip(ps, m, v, strict=True)]
            return (t + 1, moved, m, v, *each(moved, points, values))

        state = jax.lax.while_loop(going, body, (0, ps, zeros, zeros, losses, gradients))
        return state[4], state[0]

    while True:
        try:
            points, values = pipe.recv()
        except EOFError:
            return
        mse, done = jax.block_until_ready(fit(points, values))
        pipe.send((np.asarray(mse), int(done)))

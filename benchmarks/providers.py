"""Ways to do a step, each from a Problem to a function that returns (losses [N], gradients of their sum)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import Case, Problem
from strainer_fast import reference
from strainer_fast.ops import choose, losses_and_gradients

Result = tuple[Tensor, list[Tensor]]
Step = Callable[[], Result]


def ours(problem: Problem) -> Step:
    """What runs by default: the native engine where it was built."""
    p = problem
    name = choose("auto", p.points.device).name
    return lambda: losses_and_gradients(name, p.points, p.values, p.parameters, p.omegas, True)


def tiled(problem: Problem) -> Step:
    """The one-pass sweep over tiles in PyTorch's calls; for networks apart it is bmm with a backward by hand."""
    p = problem
    return lambda: losses_and_gradients("tiled", p.points, p.values, p.parameters, p.omegas, True)


def eager(problem: Problem) -> Step:
    """Plain PyTorch with autograd; heads in one product, independent networks by bmm."""
    p = problem
    return lambda: losses_and_gradients("torch", p.points, p.values, p.parameters, p.omegas, True)


def compiled(problem: Problem) -> Step:
    """torch.compile of the forward and the loss, autograd through it."""
    p = problem

    @torch.compile
    def losses(points: Tensor, values: Tensor, *parameters: Tensor) -> Tensor:
        return reference.mse(reference.siren(points, parameters[::2], parameters[1::2], p.omegas), values)

    def step() -> Result:
        each = losses(p.points, p.values, *p.parameters)
        return each.detach(), list(torch.autograd.grad(each.sum(), p.parameters))

    return step


def loop(problem: Problem) -> Step:
    """Independent networks one after another, as a Python loop over images does it."""
    p = problem
    networks = [[t.detach()[n].clone().requires_grad_() for t in p.parameters] for n in range(p.values.shape[0])]

    def step() -> Result:
        losses, gradients = [], []
        for network, target in zip(networks, p.values, strict=True):
            loss = reference.mse(reference.siren(p.points, network[::2], network[1::2], p.omegas), target)
            gradients.append(torch.autograd.grad(loss, network))
            losses.append(loss.detach())
        return torch.stack(losses), [torch.stack(g) for g in zip(*gradients, strict=True)]

    return step


def vmap(problem: Problem) -> Step:
    """torch.func: vmap of grad_and_value over the stack."""
    p = problem

    def loss(parameters: list[Tensor], target: Tensor) -> Tensor:
        return reference.mse(reference.siren(p.points, parameters[::2], parameters[1::2], p.omegas), target)

    each = torch.func.vmap(torch.func.grad_and_value(loss))
    data = [t.detach() for t in p.parameters]

    def step() -> Result:
        gradients, losses = each(data, p.values)
        return losses, gradients

    return step


def providers(case: Case) -> dict[str, Callable[[Problem], Step]]:
    """Those that can do this case; ours first. JAX has a process of its own: jax_peer.py."""
    found: dict[str, Callable[[Problem], Step]] = {"strainer_fast": ours, "strainer_fast, tiled": tiled}
    if case.independent:
        return found | {"Python loop": loop, "bmm + autograd": eager, "torch.func.vmap": vmap}
    if case.suite == "step":
        found["torch.compile"] = compiled
    # Autograd keeps all activations: some 10 GB for the largest case.
    if case.size**2 * case.width <= 2**24:
        found["autograd eager"] = eager
    return found

"""Ways to do a training step, each a small adapter from a Problem to a provider at work. To add one: README.md here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from strainer_fast import reference
from strainer_fast.benchmarks.cases import Case, Problem, Result, named, truth_of
from strainer_fast.benchmarks.harness import OURS, Gate, Named, Provider, Running, judge
from strainer_fast.benchmarks.jax_peer import jax_running
from strainer_fast.ops import choose, losses_and_gradients

Step = Callable[[], Result]

MOST_ACTIVATIONS = 2**24
"""Points x width beyond which autograd is not tried: it keeps all activations, some 10 GB by then."""


def ours(problem: Problem) -> Step:
    """What runs by default: the native engine where it was built, Triton on a GPU."""
    return _by(choose("auto", problem.points.device).name, problem)


def tiled(problem: Problem) -> Step:
    """The one-pass sweep over tiles in PyTorch's calls; for networks apart it is bmm with a backward by hand."""
    return _by("tiled", problem)


def fused(problem: Problem) -> Step:
    """Plain PyTorch with autograd; heads in one product, independent networks by bmm: what a user would fix by hand."""
    return _by("torch", problem)


def _by(implementation: str, problem: Problem) -> Step:
    p = problem
    return lambda: losses_and_gradients(implementation, p.points, p.values, p.parameters, p.omegas, True)


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


def heads_in_a_loop(problem: Problem) -> Step:
    """As STRAINER's authors' library is described: every head its own layer on a clone of the features, and a look at
    the loss in every step, for which a GPU has to be waited for."""
    p = problem
    body, (weights, biases) = p.parameters[:-2], p.parameters[-2:]
    heads = [
        (w.detach().clone().requires_grad_(), b.detach().clone().requires_grad_())
        for w, b in zip(weights, biases, strict=True)
    ]
    leaves = [*body, *(t for head in heads for t in head)]

    def step() -> Result:
        features = p.points
        for weight, bias, omega in zip(body[::2], body[1::2], p.omegas, strict=True):
            features = torch.sin(omega * nn.functional.linear(features, weight, bias))
        losses = []
        for (weight, bias), target in zip(heads, p.values, strict=True):
            losses.append(nn.functional.mse_loss(nn.functional.linear(features.clone(), weight, bias), target))
        total = torch.stack(losses).sum()
        total.item()
        gradients = torch.autograd.grad(total, leaves)
        own = gradients[: len(body)]
        stacked = [torch.stack(gradients[len(body) + i :: 2]) for i in range(2)]
        return torch.stack(losses).detach(), [*own, *stacked]

    return step


def networks_in_a_loop(problem: Problem) -> Step:
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


def siren_pytorch(problem: Problem) -> Step:
    """SirenNet of the package siren-pytorch with our weights and omegas."""
    import siren_pytorch as package

    p = problem
    network = package.SirenNet(
        dim_in=2, dim_hidden=p.parameters[0].shape[0], dim_out=p.values.shape[-1], num_layers=len(p.omegas),
        w0_initial=p.omegas[0], w0=p.omegas[1],
    ).to(p.points.device)  # fmt: skip
    pairs = zip([*network.layers, network.last_layer], p.parameters[::2], p.parameters[1::2], strict=True)
    for layer, weight, bias in pairs:
        layer.weight.data.copy_(weight.reshape(layer.weight.shape))
        layer.bias.data.copy_(bias.reshape(layer.bias.shape))
    leaves = [t for layer in [*network.layers, network.last_layer] for t in (layer.weight, layer.bias)]

    def step() -> Result:
        loss = nn.functional.mse_loss(network(p.points), p.values[0])
        gradients = torch.autograd.grad(loss, leaves)
        shaped = [g.reshape(t.shape) for g, t in zip(gradients, p.parameters, strict=True)]
        return loss.detach().reshape(1), shaped

    return step


PADDED = 16
"""tiny-cuda-nn pads inputs (with ones) and outputs to a multiple of this."""


def tiny_cuda_nn(problem: Problem) -> Running:
    """CutlassMLP with Sine of the package tiny-cuda-nn, in half precision: the only one of its networks that has sines.

    It has no biases and no omega: omegas are in the weights, biases are left out (see `without_biases`), and columns
    for the ones that fill its input are zero.
    """
    import tinycudann as package

    p = problem
    weights = [w.detach() for w in p.parameters[::2]]
    weights[-1] = weights[-1].reshape(-1, weights[-1].shape[-1])  # [N, C, H] of a single signal
    channels, width = weights[-1].shape
    settings = {"otype": "CutlassMLP", "activation": "Sine", "output_activation": "None", "n_neurons": width}
    network = package.Network(2, channels, settings | {"n_hidden_layers": len(p.omegas)})
    network.jit_fusion = False
    shapes = [(width, PADDED), *[(width, width)] * (len(p.omegas) - 1), (-(-channels // PADDED) * PADDED, width)]
    scales = (*p.omegas, 1.0)
    with torch.no_grad():
        folded = [torch.zeros(shape, device=p.points.device) for shape in shapes]
        for whole, weight, scale in zip(folded, weights, scales, strict=True):
            whole[: weight.shape[0], : weight.shape[1]] = scale * weight
        network.params.copy_(torch.cat([whole.flatten() for whole in folded]))

    def step() -> tuple[Tensor, Tensor]:
        loss = nn.functional.mse_loss(network(p.points).float(), p.values[0])
        return loss.detach(), torch.autograd.grad(loss, network.params)[0]

    def results() -> Named:
        loss, flat = step()
        found = {"losses": loss.reshape(1)}
        for i, part in enumerate(flat.split([a * b for a, b in shapes])):
            own = part.reshape(shapes[i])[: weights[i].shape[0], : weights[i].shape[1]]
            found[f"gradient {2 * i}"] = (scales[i] * own).reshape(p.parameters[2 * i].shape)
        return found

    return Running(step, results)


def without_biases(problem: Problem) -> Gate:
    """Of a network whose biases are zero, in half precision."""
    parameters = [t if i % 2 == 0 else torch.zeros_like(t) for i, t in enumerate(problem.parameters)]
    truth = named(truth_of(replace(problem, parameters=parameters)))
    wanted = {name: t for name, t in truth.items() if name == "losses" or int(name.split()[1]) % 2 == 0}
    return lambda got: judge(got, wanted, "fp16")


def provider(name: str, build: Callable[[Problem], Step], package: str | None = None) -> Provider:
    """A step as the harness wants it."""

    def running(problem: Problem) -> Running:
        step = build(problem)
        return Running(step, lambda: named(step()))

    return Provider(name, running, package)


def providers(case: Case, device: str, quick: bool) -> list[Provider]:
    """Those that can do this case; ours first."""
    found = [provider(OURS, ours)]
    if device == "cpu":
        found.append(provider(f"{OURS}, tiled", tiled))
    if case.independent:
        found += [
            provider("Python loop", networks_in_a_loop),
            provider("bmm", fused),
            provider("torch.func.vmap", vmap),
        ]
    elif case.num_signals > 1:
        found += [provider("heads in a loop", heads_in_a_loop), provider("heads fused by hand", fused)]
    elif case.size**2 * case.width <= MOST_ACTIVATIONS:
        found.append(provider("autograd", fused))
    if case.table == "step":
        if case.num_signals == 1 and device == "cuda":
            name = "tiny-cuda-nn CutlassMLP, fp16, no bias"
            found.append(Provider(name, tiny_cuda_nn, "tinycudann", without_biases))
        if case.num_signals == 1:
            found.append(provider("siren-pytorch", siren_pytorch, "siren_pytorch"))
        if not case.independent and not quick:  # half a minute of compiling
            found.append(provider("torch.compile", compiled))
        if case.threads > 1 and device == "cpu":  # XLA takes all cores
            found.append(Provider("JAX vmap" if case.independent else "JAX jit", jax_running, "jax"))
    return found

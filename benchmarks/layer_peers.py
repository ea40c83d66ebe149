"""Single layers to measure: forward, and backward to the input, the weights and the bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import strainer_fast as sf
from strainer_fast import reference
from strainer_fast.benchmarks.harness import OURS, Named, Provider, Running

OMEGA = 30.0


@dataclass(frozen=True)
class LayerCase:
    """A layer on P points.

    Args:
        kind: "sine", "heads" (N linear heads on one input) or "stack" (N sine layers on N inputs).
    """

    name: str
    kind: str
    points: int
    inputs: int
    outputs: int
    number: int = 1
    threads: int = 2
    quick: bool = False

    @property
    def flops(self) -> int:
        """Of the products: forward, back to the input, back to the weights. Sines do not count."""
        return 3 * 2 * self.points * self.inputs * self.outputs * self.number

    @property
    def traffic(self) -> int:
        """Bytes that have to move even if everything in between stays on chip: tensors in and gradients out, once."""
        inputs = self.points * self.inputs * (self.number if self.kind == "stack" else 1)
        outputs, weights = self.points * self.outputs * self.number, self.inputs * self.outputs * self.number
        # x twice (forward and weight gradients), y, its gradient, dx; W twice, dW.
        return 4 * (3 * inputs + 2 * outputs + 3 * weights)

    @property
    def axes(self) -> dict[str, int]:
        """What plots have on their axes."""
        return {"points": self.points, "width": self.inputs, "signals": self.number}


LAYER_CASES = (
    *(
        LayerCase(f"sine 256 to 256, {points:,} points", "sine", points, 256, 256, quick=points in (1024, 8192))
        for points in (256, 1024, 8192, 31684, 131072)
    ),
    LayerCase("sine 64 to 64, 31,684 points", "sine", 31684, 64, 64, quick=True),
    LayerCase("sine 512 to 512, 31,684 points", "sine", 31684, 512, 512),
    LayerCase("10 heads 256 to 3, 31,684 points", "heads", 31684, 256, 3, number=10, quick=True),
    LayerCase("64 sine layers 32 to 32, 784 points", "stack", 784, 32, 32, number=64, quick=True),
)


@dataclass(frozen=True)
class LayerProblem:
    """A case's tensors; gradients are those of sum(y * upstream)."""

    case: LayerCase
    x: Tensor  # [P, in]; [N, P, in] for a stack
    weight: Tensor  # [out, in]; [N, out, in] for heads and stacks
    bias: Tensor  # [out]; [N, out]
    upstream: Tensor  # [P, out]; [N, P, out]

    @classmethod
    def of(cls, case: LayerCase, device: str = "cpu") -> LayerProblem:
        """Weights by SIREN's rules; the input is what a sine layer gives."""
        torch.manual_seed(0)
        stack = () if case.kind == "sine" else (case.number,)
        first = stack if case.kind == "stack" else ()
        scale = (6 / case.inputs) ** 0.5 / (OMEGA if case.kind != "heads" else 1)
        weight = (2 * torch.rand(*stack, case.outputs, case.inputs) - 1) * scale
        tensors = (
            torch.sin(3 * torch.randn(*first, case.points, case.inputs)),
            weight,
            0.1 * torch.randn(*stack, case.outputs),
            torch.randn(*stack, case.points, case.outputs),
        )
        return cls(case, *(t.to(device) for t in tensors))

    def truth(self) -> Named:
        """In float64."""
        x, weight, bias = (t.double().requires_grad_() for t in (self.x, self.weight, self.bias))
        y = plain(self.case.kind, x, weight, bias)
        gradients = torch.autograd.grad(y, (x, weight, bias), self.upstream.double())
        return dict(zip(("y", "dx", "dw", "db"), (y.detach(), *gradients), strict=True))


def plain(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As PyTorch's calls have it: one product, stacks by bmm, heads in one linear layer."""
    if kind == "heads":
        number, outputs, inputs = weight.shape
        y = functional.linear(x, weight.reshape(-1, inputs), bias.reshape(-1))
        return y.reshape(-1, number, outputs).transpose(0, 1)
    if kind == "stack":
        return torch.sin(OMEGA * torch.baddbmm(bias.unsqueeze(1), x, weight.mT))
    return torch.sin(OMEGA * functional.linear(x, weight, bias))


def heads_in_a_loop(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every head on a clone of the features."""
    return torch.stack([functional.linear(x.clone(), w, b) for w, b in zip(weight, bias, strict=True)])


def layers_in_a_loop(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """One layer after another."""
    return torch.stack([torch.sin(OMEGA * functional.linear(*each)) for each in zip(x, weight, bias, strict=True)])


def by_vmap(kind: str, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """torch.func.vmap of one layer."""
    return torch.func.vmap(lambda x, weight, bias: reference.sine_linear(x, weight, bias, OMEGA))(x, weight, bias)


def _running(
    layer: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor, bias: Tensor, problem: LayerProblem
) -> Running:
    def results() -> Named:
        y = layer(x)
        gradients = torch.autograd.grad(y, (x, weight, bias), problem.upstream)
        shaped = (g.reshape(t.shape) for g, t in zip(gradients, (problem.x, problem.weight, problem.bias), strict=True))
        return dict(zip(("y", "dx", "dw", "db"), (y.detach(), *shaped), strict=True))

    return Running(results, results)


def of_function(
    function: Callable[[str, Tensor, Tensor, Tensor], Tensor], problem: LayerProblem, compiled: bool = False
) -> Running:
    """A plain function of x, weight and bias."""
    x, weight, bias = (t.clone().requires_grad_() for t in (problem.x, problem.weight, problem.bias))
    layer = torch.compile(function) if compiled else function
    return _running(lambda x: layer(problem.case.kind, x, weight, bias), x, weight, bias, problem)


def ours(problem: LayerProblem) -> Running:
    """The module that people import."""
    case, device = problem.case, problem.x.device
    layers: dict[str, Callable[[], Any]] = {
        "sine": lambda: sf.SineLinear(case.inputs, case.outputs, omega=OMEGA, device=device),
        "heads": lambda: sf.MultiHeadLinear(case.number, case.inputs, case.outputs, device=device),
        "stack": lambda: sf.BatchedSineLinear(case.number, case.inputs, case.outputs, omega=OMEGA, device=device),
    }
    return _of_module(layers[case.kind](), problem)


def siren_pytorch(problem: LayerProblem) -> Running:
    """The layer of the package siren-pytorch."""
    import siren_pytorch as package

    layer = package.Siren(problem.case.inputs, problem.case.outputs, w0=OMEGA)
    return _of_module(layer.to(problem.x.device), problem)


def _of_module(module: Any, problem: LayerProblem) -> Running:
    with torch.no_grad():
        module.weight.copy_(problem.weight)
        module.bias.copy_(problem.bias)
    return _running(module, problem.x.clone().requires_grad_(), module.weight, module.bias, problem)


def layer_providers(case: LayerCase, quick: bool) -> list[Provider]:
    """Ours first."""
    names = {"sine": "nn.Linear, sin", "heads": "one nn.Linear by hand", "stack": "bmm"}
    found = [Provider(OURS, ours), Provider(names[case.kind], partial(of_function, plain))]
    if case.kind == "heads":
        found.append(Provider("heads in a loop", partial(of_function, heads_in_a_loop)))
    if case.kind == "stack":
        found.append(Provider("loop over layers", partial(of_function, layers_in_a_loop)))
        found.append(Provider("torch.func.vmap", partial(of_function, by_vmap)))
    if case.kind == "sine":
        found.append(Provider("siren-pytorch", siren_pytorch, "siren_pytorch"))
    if not quick:
        found.append(Provider("torch.compile", partial(of_function, plain, compiled=True)))
    return found

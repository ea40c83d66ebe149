"""One pre-training step (forward, loss, backward): all heads in one product against a Python loop over heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast.ops import losses_and_gradients

SIZE = 96
CASES = [pytest.param(n, id=f"{n}_heads") for n in (1, 10)]


def one_product(model: sf.Strainer, points: Tensor, values: Tensor) -> Callable[[], list[Tensor]]:
    """What `pretrain` runs."""
    layers = [*model.encoder.layers, *model.decoder, model.head]
    parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
    return lambda: list(losses_and_gradients("tiled", points, values, parameters, model.architecture.omegas, True)[1])


def loop_over_heads(model: sf.Strainer, points: Tensor, values: Tensor) -> Callable[[], list[Tensor]]:
    """The usual way: a decoder after the other, plain modules."""
    parameters = list(model.parameters())

    def step() -> list[Tensor]:
        features = model.encoder(points)
        outputs = [
            torch.nn.functional.linear(features, weight, bias)
            for weight, bias in zip(model.head.weight, model.head.bias, strict=True)
        ]
        loss = sum(torch.nn.functional.mse_loss(o, v) for o, v in zip(outputs, values, strict=True))
        return list(torch.autograd.grad(loss, parameters))

    return step


@pytest.mark.parametrize("variant", [one_product, loop_over_heads], ids=lambda v: v.__name__)
@pytest.mark.parametrize("heads", CASES)
def test_pretrain_step(benchmark: Any, heads: int, variant: Callable[..., Callable[[], list[Tensor]]]) -> None:
    """A full step of the paper's network at 96x96."""
    torch.manual_seed(0)
    model = sf.Strainer(2, 256, 6, 1, 5, heads)
    points, values = sf.signals.grid((SIZE, SIZE)), torch.rand(heads, SIZE * SIZE, 1)
    step = variant(model, points, values)
    for gradient, expected in zip(step(), loop_over_heads(model, points, values)(), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)
    benchmark.group = f"pre-training step, {heads} heads, {SIZE}x{SIZE}"
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    benchmark.pedantic(step, warmup_rounds=2, rounds=10)

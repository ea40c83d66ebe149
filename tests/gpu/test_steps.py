"""Steps on a GPU: CUDA graphs replay to the same bits, nothing is allocated or awaited, repeated runs are equal."""

from typing import Any

import pytest
import torch
from torch import Tensor

import strainer_fast as sf
from strainer_fast.fitting.optim import Adam
from strainer_fast.fitting.steppers import make_stepper
from strainer_fast.fitting.triton_stepper import TritonStepper
from strainer_fast.ops import siren_mse

pytestmark = pytest.mark.gpu

STEPS = 8
KINDS = pytest.mark.parametrize("shared", [False, True], ids=["stack", "heads"])
# 32 wide on chip, 160 wide by layers on every GPU.
WIDTHS = pytest.mark.parametrize("width", [32, 160])
PRECISIONS = pytest.mark.parametrize("precision", ["fp32", "fp16"])


def stepper(precision: str, shared: bool, width: int, graphs: bool = True) -> TritonStepper:
    """The same problem and start every time."""
    generator = torch.Generator().manual_seed(0)
    model = sf.Strainer(2, width, 4, 1, 3, 2) if shared else sf.BatchedSiren(2, 2, width, 4, 1)
    model.reset_parameters(generator)
    layers = [*model.encoder.layers, model.head] if shared else [*model.layers, model.head]
    parameters = [p.detach().cuda().requires_grad_() for layer in layers for p in (layer.weight, layer.bias)]
    points = sf.signals.grid((40, 40)).cuda()
    values = torch.rand(2, len(points), 1, generator=generator).cuda()
    adam = Adam(parameters, sf.recipe("paper", learning_rate=1e-3), None if shared else 2)
    how: dict[str, Any] = {"implementation": "triton", "independent": not shared, "keep": True}
    ours = make_stepper(points, values, parameters, [30.0] * 3, adam, precision=precision, **how)
    assert isinstance(ours, TritonStepper)
    if not graphs:
        ours._evaluate.calls = ours._update.calls = 2  # they record in their second call only
    return ours


def run(ours: TritonStepper, steps: int = STEPS) -> Tensor:
    """Losses before each step."""
    losses = []
    for _ in range(steps):
        losses.append(ours.evaluate(0, True))
        ours.update()
    return torch.stack(losses)


@KINDS
@WIDTHS
@PRECISIONS
def test_a_graph_replays_to_the_bits_of_its_launches(precision: str, width: int, shared: bool) -> None:
    replayed, launched = (stepper(precision, shared, width, graphs) for graphs in (True, False))
    losses = run(replayed)
    assert torch.equal(losses, run(launched))
    assert bool((losses[-1] < losses[0]).all())  # and the graphs do something
    assert replayed._evaluate.graph is not None and replayed._update.graph is not None
    assert launched._evaluate.graph is None and launched._update.graph is None
    for name in ("flat", "gradients", "exp_avg", "exp_avg_sq", "previous", "step"):
        assert torch.equal(getattr(replayed, name), getattr(launched, name)), name
    assert replayed.step.tolist() == [STEPS] * len(replayed.step)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("graphs", [True, False], ids=["replayed", "launched"])
@KINDS
@WIDTHS
def test_nothing_is_allocated_or_awaited(width: int, shared: bool, graphs: bool) -> None:
    ours = stepper("fp16", shared, width, graphs)
    run(ours, 3)
    torch.cuda.synchronize()
    counters = ("allocation.all.allocated", "segment.all.allocated")
    before = torch.cuda.memory_stats()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            for _ in range(STEPS):
                ours._evaluate(ours._launch_gradients)
                ours._update(ours._launch_update)
        after = torch.cuda.memory_stats()
        for _ in range(STEPS):
            ours.evaluate(0, True)
            ours.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    last = torch.cuda.memory_stats()
    assert [after[name] - before[name] for name in counters] == [0, 0]
    # The losses that `evaluate` hands out are a copy each.
    assert last[counters[0]] - after[counters[0]] == STEPS
    assert run(ours, 1).isfinite().all()


@KINDS
@WIDTHS
@PRECISIONS
def test_repeated_steps_are_equal_to_the_bit(precision: str, width: int, shared: bool) -> None:
    first, second = (stepper(precision, shared, width) for _ in range(2))
    assert torch.equal(run(first), run(second))
    assert torch.equal(first.flat, second.flat)


def one_pass() -> tuple[Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    parameters = [p.detach().cuda().requires_grad_() for p in sf.Siren(2, 160, 4, 3).parameters()]
    return sf.signals.grid((60, 50)).cuda(), torch.rand(3000, 3).cuda(), parameters


@pytest.mark.parametrize("precision", ["fp32", "tf32x3", "tf32", "fp16", "bf16"])
def test_one_pass_gradients_repeat_and_record(precision: str) -> None:
    """The same bits every time, also from a CUDA graph that its user records."""
    points, values, parameters = one_pass()

    def gradients() -> list[Tensor]:
        loss = siren_mse(
            points, values, parameters[::2], parameters[1::2], implementation="triton", precision=precision
        )
        return [loss.detach(), *torch.autograd.grad(loss, parameters)]

    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = gradients()
    for tensor in recorded:
        tensor.detach().fill_(torch.nan)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(first, recorded, strict=True))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_the_one_pass_loss_waits_for_nothing() -> None:
    points, values, parameters = one_pass()

    def step() -> tuple[Tensor, ...]:
        loss = siren_mse(points, values, parameters[::2], parameters[1::2], implementation="triton", precision="fp16")
        return torch.autograd.grad(loss, parameters)

    expected = step()  # tables are copied to the GPU once
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

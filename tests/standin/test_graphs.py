"""CUDA graphs on the stand-in: what is recorded is done by replays only, on the memory of the recording."""

import pytest
import torch

import strainer_fast as sf
from strainer_fast.benchmarks import gpu_parts
from strainer_fast.benchmarks.cases import Case
from strainer_fast.kernels.trig import launch_sincos
from tests import standin

SMALL = Case("small", 4, 8, 3, channels=3)


def on_the_side() -> torch.cuda.Stream:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    return side


def test_operations_and_kernels_are_replayed_on_the_same_memory() -> None:
    torch.manual_seed(0)
    a = torch.randn(3, 4, 4, device="cuda")
    total, angles = torch.zeros(3, 4, 4, device="cuda"), torch.zeros(48, device="cuda")
    sine, cosine = torch.zeros(48, device="cuda"), torch.zeros(48, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(on_the_side()):
        graph.capture_begin()
        gram = torch.bmm(a, a.mT) + torch.eye(4, device="cuda")
        lower, _ = torch.linalg.cholesky_ex(gram)
        solved = torch.linalg.solve_triangular(lower, a, upper=False)
        total.add_(solved)
        torch.where(solved > 0, solved, torch.zeros_like(solved), out=a)
        angles.copy_(total.view(-1))
        launch_sincos(angles, sine, cosine)
        graph.capture_end()
    before = a.cpu()
    assert not total.any() and not sine.any() and solved.isnan().all()  # nothing is done yet
    summed = torch.zeros(3, 4, 4)
    address = solved.data_ptr()
    for _ in range(2):
        with standin.counted() as counts:
            graph.replay()
        want = torch.linalg.solve_triangular(torch.linalg.cholesky(before @ before.mT + torch.eye(4)), before,
                                             upper=False)  # fmt: skip
        summed += want
        torch.testing.assert_close(solved.cpu(), want)
        torch.testing.assert_close(total.cpu(), summed)
        torch.testing.assert_close(sine.cpu(), summed.view(-1).sin())
        before = want.clamp_min(0)
        torch.testing.assert_close(a.cpu(), before)
        assert (counts.total("replays"), counts.total("operations"), counts.total("launches")) == (1, 0, 0)
        assert counts.replayed["launch_sincos"] == 0 and counts.replayed["bmm"] == 1
        assert counts.total("replayed") >= 8 and counts.total("synchronisations") == 0
    assert solved.data_ptr() == address


def test_waiting_spoils_a_recording() -> None:
    x, graph = torch.ones(2, device="cuda"), torch.cuda.CUDAGraph()
    with (
        pytest.raises(RuntimeError, match="previous error during capture"),
        torch.cuda.graph(graph),
        pytest.raises(RuntimeError, match=r"not permitted when stream is capturing.*waits"),
    ):
        float(x.sum())
    with pytest.raises(RuntimeError, match="without a preceding successful capture"):
        graph.replay()


def test_the_default_stream_is_not_recorded() -> None:
    graph, x = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError, match="non-default stream"):
        graph.capture_begin()
    side, other = on_the_side(), torch.cuda.Stream()
    with torch.cuda.stream(side):
        graph.capture_begin()
        with torch.cuda.stream(torch.cuda.default_stream()):
            x += 1  # at once
        other.wait_stream(side)
        with torch.cuda.stream(other):
            x += 10  # part of the recording
        side.wait_event(other.record_event())
        graph.capture_end()
    assert x.tolist() == [1.0]
    graph.replay()
    assert x.tolist() == [11.0]


def test_freed_memory_is_not_replayed() -> None:
    x, out = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(x * 2)  # the product is the graph's own
    graph.replay()
    assert out.tolist() == [2.0, 2.0]
    del x
    with pytest.raises(RuntimeError, match="memory that was freed"):
        graph.replay()


def test_a_copy_to_pinned_memory_is_part_of_a_graph() -> None:
    x, seen, done = torch.ones(1, device="cuda"), torch.zeros(1, pin_memory=True), torch.cuda.Event()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(2)
        seen.copy_(x, non_blocking=True)
    graph.replay()
    done.record()
    assert done.query() and seen.tolist() == [2.0]


def test_times_mean_nothing_but_are_asked_for_as_cudas() -> None:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    end.record()
    assert start.elapsed_time(end) == 1.0
    with pytest.raises(RuntimeError, match="enable_timing"):
        start.elapsed_time(torch.cuda.Event())


def test_a_step_of_autograd_in_a_graph_equals_float64() -> None:
    """The benchmarks' peers: forward, backward and PyTorch's fused Adam in one graph, four steps of it."""
    problem = gpu_parts.problem_on(SMALL, "cuda")
    exact = gpu_parts.truth(problem)
    step = gpu_parts.pytorch(problem, "fp32", graph=True)
    for want in exact.losses.values():
        torch.testing.assert_close(step.step().double().cpu(), want.cpu(), rtol=1e-4, atol=0)


def test_a_loss_that_was_never_called_says_so_inside_a_recording() -> None:
    """Its tables would be copied to the device there; after one call outside it can be recorded."""
    network = sf.Siren(2, 24, 3, 1).to("cuda")
    points, values = torch.rand(20, 2, device="cuda"), torch.rand(20, 1, device="cuda")
    with (
        pytest.raises(RuntimeError, match="expected one call before a CUDA graph is recorded"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        network.loss(points, values)
    network.loss(points, values)
    with torch.cuda.graph(torch.cuda.CUDAGraph()), standin.counted() as counts:
        network.loss(points, values)
    assert counts.total("launches") == 0  # recorded, not done

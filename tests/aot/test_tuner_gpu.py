"""What the tuner measures with on a GPU, without one: turns, equality, kernels compiled ahead, what is left out."""

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strainer_fast.kernels import tiles as tiles_module
from strainer_fast.kernels import tune_gpu
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.tiles import TABLE, Row

HOPPER = CHIPS["sm_90"]
WIDEST = next(
    r
    for r in TABLE
    if (r.kernel, r.generation, r.precisions, r.width) == ("forward", "hopper", ("half",), tiles_module.ANY)
)


def test_calls_are_measured_in_turns_that_begin_with_another() -> None:
    order: list[int] = []
    times = {0: [3.0, 1.0, 2.0, 9.0], 1: [5.0, 5.0, 5.0, 5.0], 2: [7.0, 1.0, 7.0, 7.0]}
    left = {index: iter(values) for index, values in times.items()}

    def stopwatch(replay: Callable[[], int]) -> float:
        order.append(replay())
        return next(left[order[-1]])

    replays = [lambda index=index: index for index in range(3)]
    assert tune_gpu.interleaved(replays, stopwatch, rounds=4) == [2.5, 5.0, 7.0]
    assert order == [0, 1, 2, 1, 2, 0, 2, 0, 1, 0, 1, 2]
    assert tune_gpu.interleaved([], stopwatch) == []


class Sums:
    """A launch: partial sums of dz^T x over shares of the rows."""

    def __init__(self, shares: int, spoil: str = "") -> None:
        layers = torch.empty(4, 1, 8, 8)
        self.memory, self.shares, self.spoil = layers, shares, spoil
        self.tensors = {"x": torch.empty(1, 96, 8), "dz": torch.empty(1, 96, 8).mT.contiguous().mT, "w": layers[0],
                        "dw": torch.empty(shares, 1, 8, 8), "y": torch.empty(1, 96, 8), "count": torch.zeros(1).int(),
                        "scratch_ptr": torch.empty(shares)}  # fmt: skip

    def run(self) -> None:
        x, dz, dw, y = (self.tensors[name] for name in ("x", "dz", "dw", "y"))
        self.tensors["scratch_ptr"].fill_(self.shares)
        dw.copy_(
            torch.stack([d.mT @ a for a, d in zip(x.chunk(self.shares, 1), dz.chunk(self.shares, 1), strict=True)])
        )
        if self.spoil == "a share":
            dw[-1] *= 1.01
        if self.spoil == "nan":
            dw[0, 0, 0, 0] = math.nan
        if self.spoil != "unwritten":
            y.copy_(x @ self.memory.sum(0))


def test_the_same_result_from_other_shares_is_the_same() -> None:
    want = tune_gpu.results(Sums(2))
    assert set(want) == {"dw", "y"}
    assert tune_gpu.difference(tune_gpu.results(Sums(4)), want, "fp32") == ""


@pytest.mark.parametrize(("spoil", "precision", "message"), [
    ("a share", "fp32", r"dw: off by .* of its norm"),
    ("nan", "fp16", r"dw: off by nan"),
    ("unwritten", "fp16", r"writes \['dw'\], expected \['dw', 'y'\]"),
])  # fmt: skip
def test_another_result_is_noticed(spoil: str, precision: str, message: str) -> None:
    want = tune_gpu.results(Sums(2))
    found = tune_gpu.difference(tune_gpu.results(Sums(3, spoil)), want, precision)
    assert re.match(message, found), found


def test_numbers_depend_on_the_argument_and_not_on_what_came_before() -> None:
    def inputs(launch: Sums) -> dict[str, Tensor]:
        tune_gpu.fill(launch)
        return {name: launch.tensors[name].clone() for name in ("x", "dz", "w")} | {"memory": launch.memory.clone()}

    first, second = inputs(Sums(2)), inputs(Sums(4))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["x"], first["dz"])
    assert first["memory"].unique().numel() == first["memory"].numel()  # the layers behind the first as well
    assert float(first["x"].std()) == pytest.approx(tune_gpu.SPREAD, rel=0.1)


def test_what_workers_compile_is_found_by_launches(run_python, tmp_path: Path) -> None:
    """A launch with tensors that have memory finds the kernel that a worker compiled for tensors that have none."""
    code = """
import json
import torch
import triton
from strainer_fast.kernels import checks, tune_gpu
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.tiles import TABLE
hits = []
def listener(src, metadata, metadata_group, times, cache_hit):
    hits.append(cache_hit)
triton.knobs.compilation.listener = listener
if __name__ == "__main__":
    import multiprocessing
    chip = CHIPS["sm_90"]
    row = next(r for r in TABLE if r.kernel == "forward" and r.generation == "hopper" and r.width == 16)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        said = pool.apply(tune_gpu.compile_ahead, (row, TABLE, chip))
    checks.check_device = lambda name, tensor: None
    launch = tune_gpu.launch_of(row, TABLE, chip, "cpu")
    from triton.runtime import driver
    driver.set_active(tune_gpu._NoDriver(chip))
    launch.function.warmup(**launch.arguments, grid=launch.grid, **launch.options)
    print(json.dumps([said, hits]))
"""
    script = tmp_path / "warm.py"
    script.write_text(code)
    done = run_python(str(script), cache=tmp_path / "cache")
    if "knobs" in done.stderr:
        pytest.skip("this Triton does not say what it finds in its cache")
    assert done.stdout, done.stderr
    assert json.loads(done.stdout) == ["", [True]]


def test_tiles_that_do_not_compile_are_a_result(run_python) -> None:
    code = """
from dataclasses import replace
from strainer_fast.kernels import tune_gpu
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.tiles import TABLE
row = next(r for r in TABLE if r.kernel == "forward" and r.generation == "hopper" and r.width == 16)
print(tune_gpu.compile_ahead(replace(row, tiles=replace(row.tiles, warps=3)), TABLE, CHIPS["sm_90"]))
"""
    done = run_python("-c", code)
    assert "num_warps" in done.stdout or "power of 2" in done.stdout, (done.stdout, done.stderr)


class Graph:
    def replay(self) -> None:
        pass


@pytest.fixture
def gpu_clock(monkeypatch: pytest.MonkeyPatch) -> tune_gpu.GpuClock:
    """GpuClock's own decisions, with launches of `Sums` and graphs that take 20 launches of a second each."""

    class Now:
        """A pool that works at once."""

        def __init__(self, workers: int, *_: object) -> None:
            self.alive = workers > 0

        def apply_async(self, function: Callable, arguments: tuple):
            said = function(*arguments)
            return type("Said", (), {"get": lambda self, limit: said})()

        def terminate(self) -> None:
            self.alive = False

        def join(self) -> None:
            assert not self.alive

    def launch_of(row: Row, rows: Sequence[Row], chip: object, device: str) -> Sums:
        if row.tiles.stages == 5:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return Sums(2 + row.tiles.stages % 3, spoil="a share" if row.tiles.warps == 4 else "")

    monkeypatch.setattr(tune_gpu.multiprocessing, "get_context", lambda kind: type("Context", (), {"Pool": Now}))
    monkeypatch.setattr(tune_gpu, "launch_of", launch_of)
    monkeypatch.setattr(tune_gpu, "compile_ahead", lambda row, *_: "" if row.tiles.points != 256 else "too large")
    monkeypatch.setattr(tune_gpu, "_recorded", lambda launch, stream: Graph())
    monkeypatch.setattr(tune_gpu, "_events", lambda replay: 20.0)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    return tune_gpu.GpuClock(TABLE, HOPPER, workers=1)


def choices_of(row: Row, **changes: int) -> Row:
    return replace(row, tiles=replace(row.tiles, **changes))


def test_only_candidates_that_run_and_agree_get_a_time(gpu_clock: tune_gpu.GpuClock, capsys) -> None:
    row = WIDEST  # 8 warps
    with gpu_clock as clock:
        found = clock.seconds([row, choices_of(row, points=256), choices_of(row, warps=4), choices_of(row, stages=3)])
    assert found == [1.0, math.inf, math.inf, 1.0]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "too large" in said[0] and "dw: off by" in said[1]


def test_the_first_that_runs_is_what_others_are_compared_with(gpu_clock: tune_gpu.GpuClock) -> None:
    row = choices_of(WIDEST, points=256)
    with gpu_clock as clock:
        assert clock.seconds([row, choices_of(row, points=128), choices_of(row, points=128, warps=4)]) == [
            math.inf,
            1.0,
            math.inf,
        ]


def test_a_fault_of_the_device_ends_the_search(gpu_clock: tune_gpu.GpuClock) -> None:
    row = WIDEST
    with gpu_clock as clock, pytest.raises(tune_gpu.DeviceLost, match=r"row/forward/hopper.*stages=5.*CUDA error"):
        clock.seconds([row, choices_of(row, stages=5)])
    assert not clock.pool.alive

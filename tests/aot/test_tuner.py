"""The tuner, without a GPU: it walks to the fastest tiles of a pretended clock, stops in time, writes and goes on."""

import importlib.util
import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from strainer_fast.kernels import table_file, tune, tune_gpu
from strainer_fast.kernels import tiles as tiles_module
from strainer_fast.kernels.cases import row_name
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.configs import illegal
from strainer_fast.kernels.roofline import launches_of, step_times
from strainer_fast.kernels.tiles import TABLE, Row, Tiles

HOPPER = CHIPS["sm_90"]
OWN = [row for row in TABLE if row.generation == "hopper"]
MACHINE = {"gpu": "pretended", "chip": "sm_90", "triton": "3.7.1"}


class FakeClock:
    """Tiles take as long as they are far from 64 points, 64 outputs, 8 warps; with 256 points they cannot run.

    `now` is the time that measuring has taken: a second for each set of choices.
    """

    def __init__(self, of: Callable[[Tiles], float] | None = None) -> None:
        self.of = of or self.far
        self.now = 0.0
        self.compiled: list[Row] = []
        self.measured: list[Row] = []  # the first of each set

    @staticmethod
    def far(t: Tiles) -> float:
        far = abs(math.log2(t.points / 64)) + abs(math.log2(t.outputs / 64)) + (t.warps != 8)
        return math.inf if t.points == 256 else 1.0 + far

    def compile(self, choices: Sequence[Row]) -> None:
        self.compiled += choices

    def seconds(self, choices: Sequence[Row]) -> list[float]:
        self.now += 1.0
        self.measured.append(choices[0])
        return [self.of(choice.tiles) for choice in choices]


def row_of(kernel: str, width: int, precision: str = "half") -> Row:
    return next(r for r in OWN if (r.kernel, r.precisions, r.width) == (kernel, (precision,), width))


@cache
def by_cost() -> list[Row]:
    return tune.wanted_rows(TABLE, HOPPER)


def wanted_of(kernel: str) -> list[Row]:
    return [row for row in by_cost() if row.kernel == kernel]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tiles.py of its own."""
    copy = tmp_path / "tiles.py"
    copy.write_text(Path(tiles_module.__file__).read_text())
    return copy


def read(path: Path) -> tuple[Row, ...]:
    spec = importlib.util.spec_from_file_location(tiles_module.__name__, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TABLE


def same(a: Sequence[Row], b: Sequence[Row]) -> bool:
    """Rows of another load of tiles.py are of other classes."""
    return list(map(repr, a)) == list(map(repr, b))


def run(path: Path, clock: FakeClock, wanted: Sequence[Row], out: Path | None = None, seconds: float = math.inf):
    return tune.run(HOPPER, clock, wanted, TABLE, path, out, MACHINE, lambda: clock.now < seconds)


def lines_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in out.read_text().splitlines()]


# The search


def test_it_walks_to_the_fastest() -> None:
    row = row_of("forward", tiles_module.ANY)
    row = replace(row, tiles=replace(row.tiles, points=32, outputs=128, warps=4))
    result = tune.tune_row(row, HOPPER, FakeClock())
    best = result.best
    assert (best.tiles.points, best.tiles.outputs, best.tiles.warps) == (64, 64, 8)
    assert result.faster == pytest.approx(4.0)
    assert result.whole and table_file.same_place(best, row)
    assert len({t for t, _ in result.tried}) > 6 and result.tried[0] == (row.tiles, 4.0)


def test_it_leaves_what_is_not_clearly_slower() -> None:
    row = row_of("forward", tiles_module.ANY)
    result = tune.tune_row(row, HOPPER, FakeClock(lambda t: 1.0 if t == row.tiles else 0.99))
    assert result.best == row and result.faster == 1.0
    assert "unchanged" in result.line()


def test_it_escapes_tiles_that_cannot_run() -> None:
    row = row_of("forward", tiles_module.ANY)
    row = replace(row, tiles=replace(row.tiles, points=256, outputs=64, inputs=32, warps=8))
    result = tune.tune_row(row, HOPPER, FakeClock())
    assert result.best.tiles.points == 64 and math.isfinite(result.faster)
    assert json.loads(json.dumps(result.to_dict(MACHINE)))["tried"][0][-1] is None  # JSON has no infinity


def test_nothing_is_taken_where_nothing_runs() -> None:
    row = row_of("forward", tiles_module.ANY)
    result = tune.tune_row(row, HOPPER, FakeClock(lambda t: math.inf))
    assert result.best == row


def test_neighbours_are_legal_and_no_wider_than_the_layer() -> None:
    for row in OWN:
        for tiles in tune.neighbours(row, HOPPER):
            assert illegal(replace(row, tiles=tiles), HOPPER) is None
            assert max(tiles.outputs, tiles.inputs) <= max(row.tiles.outputs, row.tiles.inputs, row.width)


def test_neighbours_serve_the_layers_that_the_row_is_for() -> None:
    """A heads row says how many columns it takes; whole networks have all of their width at once."""
    for row in OWN:
        for tiles in tune.neighbours(row, HOPPER):
            assert table_file.same_place(row, replace(row, tiles=tiles))
            if row.kernel in ("heads", "network_forward", "network_step"):
                assert tiles.outputs == row.tiles.outputs
            if row.kernel in ("heads", "network_forward"):
                assert tiles.inputs == row.tiles.inputs


def test_rows_for_other_columns_are_other_rows() -> None:
    narrow, wide = (r for r in OWN if (r.kernel, r.precisions, r.width) == ("heads", ("half",), 256))
    assert narrow.tiles.outputs != wide.tiles.outputs
    assert not table_file.same_place(narrow, wide)
    for row in (narrow, wide):
        launch = tune_gpu.launch_of(row, TABLE, HOPPER, "meta")
        assert launch.constants["BLOCK_C"] == row.tiles.outputs
        assert launch.constants["BLOCK_P"] == row.tiles.points
        assert (launch.options["num_warps"], launch.options["num_stages"]) == (row.tiles.warps, row.tiles.stages)


# Which rows, in which order


def test_filters() -> None:
    def wanted(**filters: list) -> set[tuple]:
        return {(r.generation, r.kernel, *r.precisions, r.width) for r in tune.wanted_rows(TABLE, HOPPER, **filters)}

    everything = wanted()
    assert {g for g, *_ in everything} == {"hopper"} and len(everything) > 60
    assert {k for _, k, *_ in wanted(kernels=["forward"])} == {"forward"}
    assert {p for _, _, p, _ in wanted(precisions=["bf16"])} == {"half"}
    assert {w for *_, w in wanted(widths=[32])} == {32}
    assert {w for *_, w in wanted(widths=[256])} == {256, tiles_module.ANY}
    assert wanted(kernels=["forward"], precisions=["fp32"], widths=[128]) == set()
    assert everything == wanted(precisions=["fp16", "tf32", "fp32"])


def test_the_dearest_rows_of_the_half_precision_step_come_first() -> None:
    rows = by_cost()
    costs = tune.costs(OWN, HOPPER)
    first = [costs[row][0] for row in rows]
    assert first == sorted(first, reverse=True)
    # All that the table has tiles for is attributed to a row; the rest of the step is sums and the optimiser.
    times = step_times(launches_of(HOPPER, "fp16", 178 * 178), HOPPER)
    names = ("forward", "input_gradient", "first_gradient", "weight_gradient", "heads")
    assert sum(first) == pytest.approx(sum(t.total for t in times if t.name.startswith(names)), rel=1e-6)
    assert all("half" in row.precisions and row.width >= 256 for row in rows[:5])


def test_an_unknown_chip_is_modelled_as_one_of_its_generation() -> None:
    chip = replace(HOPPER, arch=103)
    assert tune.wanted_rows(TABLE, chip) == by_cost()


# Time, and what is written when


def test_rows_are_compiled_before_they_are_measured_and_a_few_ahead(path: Path) -> None:
    clock = FakeClock(lambda t: 1.0)
    wanted = wanted_of("forward")
    run(path, clock, wanted, seconds=1)
    assert clock.measured == wanted[:1]
    assert {row_name(r) for r in clock.compiled} == {row_name(r) for r in wanted[: 1 + tune.AHEAD]}


def test_only_wanted_rows_change(path: Path) -> None:
    rows = run(path, FakeClock(), wanted_of("forward"))
    changed = [new for old, new in zip(TABLE, rows, strict=True) if old != new]
    assert changed and {(r.kernel, r.generation) for r in changed} == {("forward", "hopper")}
    assert same(read(path), rows)


def test_it_stops_between_rounds_when_the_time_is_up(path: Path, tmp_path: Path) -> None:
    out, clock = tmp_path / "out.jsonl", FakeClock()
    wanted = wanted_of("forward") + wanted_of("weight_gradient")
    rows = run(path, clock, wanted, out, seconds=5)
    assert clock.now == 5
    found = lines_of(out)
    assert [line["whole"] for line in found] == [True] * (len(found) - 1) + [False]
    assert same(read(path), rows) and rows != list(TABLE)


def test_the_table_is_written_after_each_row(path: Path) -> None:
    wanted = [r for r in by_cost() if r.kernel != "heads" and FakeClock.far(r.tiles) > 2][:3]
    assert len(wanted) == 3
    seen = []

    class Looking(FakeClock):
        def seconds(self, choices: Sequence[Row]) -> list[float]:
            seen.append(sum(repr(a) != repr(b) for a, b in zip(TABLE, read(path), strict=True)))
            return super().seconds(choices)

    run(path, Looking(), wanted)
    assert seen[0] == 0 and seen[-1] == 2 and seen == sorted(seen)


def test_interrupted_it_goes_on_where_it_was(path: Path, tmp_path: Path) -> None:
    wanted = wanted_of("input_gradient")
    whole = run(path, FakeClock(), wanted)
    path.write_text(Path(tiles_module.__file__).read_text())

    class Interrupted(FakeClock):
        def seconds(self, choices: Sequence[Row]) -> list[float]:
            if self.now >= 7:
                raise KeyboardInterrupt
            return super().seconds(choices)

    out, clock = tmp_path / "out.jsonl", Interrupted()
    with pytest.raises(KeyboardInterrupt):
        run(path, clock, wanted, out)
    done = [line["row"] for line in lines_of(out)]
    assert 0 < len(done) < len(wanted)
    with out.open("a") as file:
        file.write('{"row": "row/input_grad')  # it was killed while it wrote a line
    again = FakeClock()
    rows = run(path, again, wanted, out)
    assert not {row_name(r) for r in again.measured} & set(done)
    assert rows == whole and same(read(path), whole)


def test_a_row_that_ran_out_of_time_is_measured_again(path: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "out.jsonl", [row_of("forward", tiles_module.ANY)]
    run(path, FakeClock(), wanted, out, seconds=1)
    (line,) = lines_of(out)
    assert not line["whole"] and line["new"] != line["old"]
    again = FakeClock()
    run(path, again, wanted, out)
    assert astuple(again.measured[0].tiles) == tuple(line["new"])  # from where it was


def test_results_of_another_machine_are_not_gone_on_from(path: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "out.jsonl", [row_of("forward", tiles_module.ANY)]
    run(path, FakeClock(), wanted, out)
    line = lines_of(out)[0] | {"triton": "3.6.0"}
    out.write_text(json.dumps(line) + "\n")
    path.write_text(Path(tiles_module.__file__).read_text())
    clock = FakeClock()
    run(path, clock, wanted, out)
    assert clock.measured[0] == wanted[0]


def test_a_launch_that_ends_the_context_is_noted_and_skipped_next_time(path: Path, tmp_path: Path) -> None:
    out, wanted = tmp_path / "out.jsonl", wanted_of("forward")[:3]

    class Broken(FakeClock):
        def seconds(self, choices: Sequence[Row]) -> list[float]:
            if table_file.same_place(choices[0], wanted[1]):
                raise tune_gpu.DeviceLost("illegal memory access")
            return super().seconds(choices)

    with pytest.raises(tune_gpu.DeviceLost):
        run(path, Broken(), wanted, out)
    assert [line["error"] for line in lines_of(out)] == ["", "illegal memory access"]
    run(path, Broken(), wanted, out)
    assert [line["row"] for line in lines_of(out)] == [row_name(r) for r in wanted]


def test_results_are_applied_to_a_table(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out, wanted = tmp_path / "out.jsonl", wanted_of("forward")
    rows = run(path, FakeClock(), wanted, out)
    path.write_text(Path(tiles_module.__file__).read_text())
    monkeypatch.setattr(tiles_module, "__file__", str(path))
    assert tune.main(["--out", str(out), "--apply"]) == 0
    assert same(read(path), rows)
    assert "rows changed" in capsys.readouterr().out


@pytest.mark.parametrize("new", [[256, 256, 128, 8, 4], [48, 64, 32, 4, 2]])
def test_illegal_results_are_refused(new: list[int]) -> None:
    name = row_name(row_of("forward", tiles_module.ANY))
    with pytest.raises(ValueError, match="expected legal tiles, got"):
        tune.apply([{"row": name, "new": new}], TABLE)


def test_a_heads_row_does_not_become_one_for_other_columns() -> None:
    row = row_of("heads", 256)
    with pytest.raises(ValueError, match="expected legal tiles"):
        tune.apply([{"row": row_name(row), "new": [*astuple(row.tiles)[:1], 32, *astuple(row.tiles)[2:]]}], TABLE)


@pytest.mark.parametrize("text", ["not json", "[]", '{"row": "row/forward/hopper/half/any"}', "null", "{}",
                                  '{"row": 1, "new": [64, 64, 32, 4, 3], "whole": true}'])  # fmt: skip
def test_what_is_no_result_is_left_out(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(text + "\n")
    assert tune.read_results(out, TABLE) == []
    assert f"{out}:1: left out" in capsys.readouterr().err


# The file of the table


def test_the_written_table_is_read_back(path: Path) -> None:
    source = path.read_text()
    rows = [replace(r, tiles=replace(r.tiles, points=16)) for r in TABLE]
    for _ in range(2):  # its own output is a table as well
        table_file.write_table(path, rows)
        assert same(read(path), rows)
    text = path.read_text()
    comments = [line.strip() for line in source.splitlines() if line.strip().startswith("#")]
    assert [line.strip() for line in text.splitlines() if line.strip().startswith("#")] == comments
    assert max(map(len, text.splitlines())) <= 120
    assert text.endswith(")  # fmt: skip\n")
    table_file.write_table(path, TABLE)
    assert same(read(path), TABLE)
    assert sorted(p.name for p in path.parent.iterdir()) == ["tiles.py"]


def test_another_table_is_not_written(path: Path) -> None:
    before = path.read_text()
    for rows in (TABLE[1:], (*TABLE, TABLE[0]), TABLE[:-1]):
        with pytest.raises(ValueError, match="rows: expected"):
            table_file.write_table(path, rows)
    assert path.read_text() == before


def test_names_of_rows_are_unique() -> None:
    names = [row_name(row) for row in TABLE]
    assert len(set(names)) == len(names)


# The command line


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = Path(tiles_module.__file__).read_text()
    assert tune.main([]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert Path(tiles_module.__file__).read_text() == before


def test_apply_needs_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--apply"], ["--apply", "--out", str(tmp_path / "none.jsonl")]):
        with pytest.raises(SystemExit) as error:
            tune.main(arguments)
        assert error.value.code == 2
        assert "--apply: expected a file of results" in capsys.readouterr().err


# What does the measuring


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
    row = row_of("forward", tiles_module.ANY)  # 8 warps
    with gpu_clock as clock:
        found = clock.seconds([row, choices_of(row, points=256), choices_of(row, warps=4), choices_of(row, stages=3)])
    assert found == [1.0, math.inf, math.inf, 1.0]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "too large" in said[0] and "dw: off by" in said[1]


def test_the_first_that_runs_is_what_others_are_compared_with(gpu_clock: tune_gpu.GpuClock) -> None:
    row = choices_of(row_of("forward", tiles_module.ANY), points=256)
    with gpu_clock as clock:
        assert clock.seconds([row, choices_of(row, points=128), choices_of(row, points=128, warps=4)]) == [
            math.inf,
            1.0,
            math.inf,
        ]


def test_a_fault_of_the_device_ends_the_search(gpu_clock: tune_gpu.GpuClock) -> None:
    row = row_of("forward", tiles_module.ANY)
    with gpu_clock as clock, pytest.raises(tune_gpu.DeviceLost, match=r"row/forward/hopper.*stages=5.*CUDA error"):
        clock.seconds([row, choices_of(row, stages=5)])
    assert not clock.pool.alive

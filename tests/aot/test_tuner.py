"""The tuner, without a GPU: it walks to the fastest tiles of a pretended clock, stops in time, writes and goes on."""

import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import cache
from pathlib import Path

import pytest

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
    assert everything == wanted(precisions=["fp16", "tf32", "tf32x3", "fp32"])


def test_the_dearest_rows_of_the_half_precision_step_come_first() -> None:
    rows = by_cost()
    costs = tune.costs(OWN, HOPPER)
    first = [costs[row][0] for row in rows]
    assert first == sorted(first, reverse=True)
    # All that the table has tiles for is attributed to a row; the rest of the step is sums and the optimiser.
    times = step_times(launches_of(HOPPER, "fp16", 178 * 178), HOPPER)
    names = ("forward", "gradient_chain", "first_gradient", "weight_gradient", "heads")
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

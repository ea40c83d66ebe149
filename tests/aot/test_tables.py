"""The table of tiles is legal, the tuner chooses and writes as it should, the model adds up: nothing is compiled."""

import importlib.util
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from strainer_fast.kernels import tiles as tiles_module
from strainer_fast.kernels import tune
from strainer_fast.kernels.cases import row_name
from strainer_fast.kernels.chip import CHIPS, Chip
from strainer_fast.kernels.configs import generation, illegal
from strainer_fast.kernels.tiles import TABLE, Row

PAIRS = [(row, chip) for row in TABLE for chip in CHIPS.values() if generation(chip) == row.generation]


@pytest.mark.parametrize(("row", "chip"), PAIRS, ids=[f"{row_name(r)}-{c.name}" for r, c in PAIRS])
def test_rows_are_legal(row: Row, chip: Chip) -> None:
    assert illegal(row, chip) is None


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> tune.Clock:
    """Tiles take as long as they are far from 64 points, 64 outputs, 8 warps; with 256 points they cannot run."""
    monkeypatch.setattr(tune, "call_of", lambda row, rows, chip, device: row.tiles)

    def seconds(calls: Sequence[tiles_module.Tiles]) -> list[float]:
        def one(t: tiles_module.Tiles) -> float:
            far = abs(math.log2(t.points / 64)) + abs(math.log2(t.outputs / 64)) + (t.warps != 8)
            return math.inf if t.points == 256 else 1.0 + far

        return [one(t) for t in calls]

    return seconds


def row_of(kernel: str, width: int) -> Row:
    return next(r for r in TABLE if (r.kernel, r.generation, r.width) == (kernel, "hopper", width))


def test_the_tuner_walks_to_the_fastest(clock: tune.Clock) -> None:
    row = row_of("forward", tiles_module.ANY)
    row = replace(row, tiles=replace(row.tiles, points=32, outputs=128, warps=4))
    best, faster = tune.tune_row(row, TABLE, CHIPS["sm_90"], clock)
    assert (best.tiles.points, best.tiles.outputs, best.tiles.warps) == (64, 64, 8)
    assert faster == pytest.approx(4.0)
    assert tune.same_place(best, row)


def test_the_tuner_leaves_what_is_not_clearly_slower(clock: tune.Clock) -> None:
    row = row_of("forward", tiles_module.ANY)
    best, faster = tune.tune_row(row, TABLE, CHIPS["sm_90"], lambda calls: [1.0, *[0.99] * (len(calls) - 1)])
    assert best == row and faster == 1.0


def test_the_tuner_escapes_tiles_that_cannot_run(clock: tune.Clock) -> None:
    row = row_of("forward", tiles_module.ANY)
    row = replace(row, tiles=replace(row.tiles, points=256, outputs=64, inputs=32, warps=8))
    best, faster = tune.tune_row(row, TABLE, CHIPS["sm_90"], clock)
    assert best.tiles.points == 64 and math.isfinite(faster)


def test_neighbours_are_legal_and_no_wider_than_the_layer() -> None:
    chip = CHIPS["sm_90"]
    for row in TABLE:
        if row.generation == "hopper":
            for tiles in tune.neighbours(row, chip):
                assert illegal(replace(row, tiles=tiles), chip) is None
                assert max(tiles.outputs, tiles.inputs) <= max(row.tiles.outputs, row.tiles.inputs, row.width)


def test_only_rows_of_the_chip_are_tuned(clock: tune.Clock) -> None:
    rows = tune.tune(TABLE, CHIPS["sm_90"], clock, kernels=["forward"])
    changed = [new for old, new in zip(TABLE, rows, strict=True) if old != new]
    assert changed and {(r.kernel, r.generation) for r in changed} == {("forward", "hopper")}


def read(path: Path) -> tuple[Row, ...]:
    spec = importlib.util.spec_from_file_location(tiles_module.__name__, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TABLE


def test_the_written_table_is_read_back(tmp_path: Path, clock: tune.Clock) -> None:
    path, source = tmp_path / "tiles.py", Path(tiles_module.__file__).read_text()
    path.write_text(source)
    tuned = tune.tune(TABLE, CHIPS["sm_90"], clock)
    for _ in range(2):  # its own output is a table as well
        tune.write_table(path, tuned)
        assert list(map(repr, read(path))) == list(map(repr, tuned))
    text = path.read_text()
    comments = [line.strip() for line in source.splitlines() if line.strip().startswith("#")]
    assert [line.strip() for line in text.splitlines() if line.strip().startswith("#")] == comments
    assert max(map(len, text.splitlines())) <= 120
    assert text.endswith(")  # fmt: skip\n")
    tune.write_table(path, TABLE)
    assert list(map(repr, read(path))) == list(map(repr, TABLE))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiles.py"]


def test_another_table_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "tiles.py"
    path.write_text(Path(tiles_module.__file__).read_text())
    before = path.read_text()
    for rows in (TABLE[1:], (*TABLE, TABLE[0]), TABLE[:-1]):
        with pytest.raises(ValueError, match="rows: expected"):
            tune.write_table(path, rows)
    assert path.read_text() == before


def test_tuning_needs_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    before = Path(tiles_module.__file__).read_text()
    assert tune.main([]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert Path(tiles_module.__file__).read_text() == before


def test_the_model_of_whole_small_fits_adds_up(run_python) -> None:
    code = """
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.small_fits_model import PHASE, UPDATE, launch_of, launch_time, work_of
chip = CHIPS["sm_90"]
launch = launch_of(chip, "fp16", 32)
networks, programs = launch.arguments["num_rows"], launch.grid[0]
assert programs == 2 * chip.processors and networks == 4 * programs
assert launch.arguments["parameters"] == 2 * 32 + 32 + 2 * 33 * 32 + 33 * 3
work, clocks = work_of(launch)
# 784 points are 13 tiles of 64; three layers forward and back, and a head.
assert clocks == 4 * 200 * (13 * 7 * PHASE + 3 * UPDATE)
assert work.product == 6 * networks * 200 * 13 * 64 * 32 * (2 * 32 + 16)
time = launch_time(launch, chip)
assert time.terms["latency"] == clocks / 1.76e9
assert networks / time.total > 5000  # fits a second, modelled: what the kernel was written for
assert launch_time(launch_of(chip, "fp16", 64), chip).total > time.total
print("ok")
"""
    done = run_python("-c", code)
    assert done.stdout == "ok\n", done.stderr


def test_the_model_adds_up(run_python) -> None:
    code = """
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.roofline import LAUNCH, launches_of, step_times
chip = CHIPS["sm_90"]
work = {p: step_times(launches_of(chip, p, 178 * 178), chip) for p in ("fp16", "tf32")}
# Five layers of 256 and a head: forward and both gradients of four products, on tiles padded to 31744 rows.
products = [t for t in work["fp16"] if t.terms["matrix"] and t.name != "heads"]
assert len(products) == 12, [t.name for t in products]
flops = 2 * 31744 * 256 * 256
for t in products:
    assert t.terms["matrix"] >= flops / (0.8 * 989e12), t
assert all(t.total == max(t.terms.values()) + LAUNCH for t in work["fp16"])
# Half the bytes and twice the matrix unit's speed.
assert sum(t.total for t in work["fp16"]) < 0.7 * sum(t.total for t in work["tf32"])
print("ok")
"""
    done = run_python("-c", code)
    assert done.stdout == "ok\n", done.stderr

"""The search for recipes: rows are resumed, tables say what the rows say, and every reason names a row that exists."""

import json
import math
from pathlib import Path

import pytest

import strainer_fast as sf
from strainer_fast.benchmarks.time_to_psnr import __main__ as runner
from strainer_fast.benchmarks.time_to_psnr import report
from strainer_fast.benchmarks.time_to_psnr.domains import DOMAINS, training_signals
from strainer_fast.benchmarks.time_to_psnr.methods import PRIORS, REPORTED, SEARCHED, SIREN_GRID, SMALL, Method, Source
from strainer_fast.fitting.presets import REASONS


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "ENCODERS", tmp_path / "encoders")
    monkeypatch.setattr(sf.Architecture, "__init__", _narrow(sf.Architecture.__init__))


def _narrow(init: object) -> object:
    def narrow(self: sf.Architecture, width: int = 16, layers: int = 4, shared: int = 3, omega: float = 30.0) -> None:
        init(self, width, layers, shared, omega)

    return narrow


@pytest.mark.usefixtures("_here")
def test_a_run_is_resumed_and_knows_its_encoder(tmp_path: Path) -> None:
    source = Source("short", images=2, steps={"photos": 3, "*": 4})
    methods = [Method("plain"), Method("ours", recipe="fast", source=source)]
    path = tmp_path / "rows.jsonl"
    run = (["brain-mri"], "tune", 12, 3, [0], 1)
    runner.run(path, methods[1:], *run)
    first = path.read_text()
    path.write_text(first + '{"method": "cut')
    runner.run(path, methods, *run)
    rows = runner.read_rows(path)
    assert [r["method"] for r in rows] == ["ours", "plain"]
    assert rows[0]["pretraining"] | {"psnr": 0} == {
        "source": "short", "steps": 4, "shape": [12, 12], "signals": 2, "psnr": 0,
    }  # fmt: skip
    assert rows[1]["pretraining"] is None
    assert [len(r["psnr"]) for r in rows] == [4, 4]
    assert all(math.isfinite(r["between"]) for r in rows)


def test_no_image_is_both_tuned_on_and_reported() -> None:
    for name in ("brain-mri", "photos"):
        names = {split: {s.name for s in DOMAINS[name].load(split, 8)} for split in ("train", "tune", "report")}
        assert not names["report"] & (names["train"] | names["tune"])
        assert not names["train"] & names["tune"]
        assert not {s.name for s in training_signals(name, 8, True)} & names["report"]
        assert len(names["report"]) == (4 if name == "faces" else 3)


def test_methods_have_names_of_their_own_and_recipes_that_exist() -> None:
    for methods in (REPORTED, SEARCHED, SIREN_GRID, SMALL, PRIORS):
        names = [m.name for m in methods]
        assert len(set(names)) == len(names)
        for method in methods:
            assert method.fit_recipe(steps=1).steps == 1
            if method.source is not None:
                sf.recipe(method.source.recipe, **method.source.changes)


def test_every_reason_names_rows_that_were_run() -> None:
    rows = {r["method"] for r in runner.read_rows(runner.RESULTS / runner.FILES["search"])}
    for what in ("grid", "small"):
        rows |= {r["method"] for r in runner.read_rows(runner.RESULTS / runner.FILES[what])}
    rows |= {r["method"] for r in runner.read_rows(runner.DENOISING)}
    named = {row for preset in REASONS.values() for _, row in preset.values() if row}
    assert named
    assert named <= rows


def test_medians_and_missing_targets() -> None:
    assert report.median([3.0, 1.0, math.inf]) == 3.0
    assert report.median([3.0, 1.0]) == 3.0
    assert math.isinf(report.median([1.0, math.inf, math.inf]))
    assert runner.first_step([10.0, 29.9, 30.0, 28.0], 30) == 2
    assert runner.first_step([10.0], 30) is None
    assert runner.first_step([10.0, None], 30) == 1  # exact
    text = report.replace_between("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb", "x", ["new | \\1"])
    assert text == "a\n<!-- x: begin -->\nnew | \\1\n<!-- x: end -->\nb"


def test_tables_and_plots_of_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"method": name, "domain": "faces", "image": image, "size": 178, "steps": 3, "seed": 0, "psnr": curve,
         "stop": stop, "pretraining": known}
        for name, stop, known in (("SIREN, paper", "budget", None),
                                  ("fast", "exact", {"steps": 500, "shape": [112, 92], "source": "fast"}))
        for image, curve in (("a", [20.0, 31.0, 41.0, 55.0]), ("b", [20.0, 25.0, 31.0, 36.0]))
    ]  # fmt: skip
    timing = [
        {"method": m, "domain": "faces", "start_seconds": 0.5, "step_seconds": 0.25, "pretrain_step_seconds": 0.1}
        for m in ("SIREN, paper", "fast")
    ]
    for name, content in (("psnr-report.jsonl", rows), ("psnr-timing.jsonl", timing)):
        (tmp_path / name).write_text("".join(json.dumps(r) + "\n" for r in content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "TIMING", tmp_path / "psnr-timing.jsonl")
    monkeypatch.setattr(report, "PICTURES", tmp_path / "pictures")
    made = report.Report()
    steps = report.by_target(made, report.steps_to, ".0f", None)
    never = "not reached, 1 of 2"
    assert steps[2] == f"| SIREN, paper | 2 | 2 (1 to 2) | 3 (2 to 3) | {never} | {never} | {never} |"
    assert steps[3].startswith("| fast (500 steps at 112) | 2 |")
    assert "| 1.0 (0.8 to 1.0) |" in report.by_target(made, made.seconds_to, ".1f", "faces")[2]
    assert report.amortised(made, 30)[3] == "| fast | 51.0 | 6.0 | 1.5 | 1.1 |"
    assert report.exactness(made)[3] == "| fast | 3 |"
    assert report.summary(made)["methods"]["SIREN, paper"]["steps"]["35"] == 3
    assert all(path.stat().st_size > 10_000 for path in report.draw(made))

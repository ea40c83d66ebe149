"""First light rehearsed: its command as it is, on the stand-in; what becomes of its rows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from strainer_fast._checks import InputError
from strainer_fast.benchmarks.first_light import __main__ as runner
from strainer_fast.benchmarks.first_light import last, publish, rows, summary

ROOT = Path(__file__).parents[2]

MARKED = "# A page\n<!-- first light: begin -->\nnothing\n<!-- first light: end -->\nrest\n"


def command(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"OUT": str(out), "PYTHON": sys.executable}
    return subprocess.run(
        ["bash", "benchmarks/first_light/run.sh", "--small", "--through", "tests.standin run", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("first-light")
    done = command(out, "--stage", "1", "2", "3", "7", "--parts", "1", "--patience", "8")
    assert done.returncode == 0, done.stdout + done.stderr
    return out, done.stdout


def test_stages_leave_rows_and_a_summary(rehearsed: tuple[Path, str]) -> None:
    out, printed = rehearsed
    found = rows.read(out / "rows.jsonl")
    assert {row["stage"] for row in found} == {1, 2, 3, 7}
    assert not [row for row in found if "failed" in row or "left_out" in row]
    judged = [row for row in found if row.get("what") == "equality"]
    assert len(judged) >= 10 and all(row["right"] for row in judged)
    beside = [row for row in found if row.get("what") == "beside the CPU"]
    assert {(r["recipe"], r["where"]) for r in beside} == {
        (name, f"cuda {p}") for name in ("paper", "fast") for p in ("fp32", "auto")}  # fmt: skip
    assert all(abs(row["off_db"]) < 0.1 for row in beside)
    text = (out / "summary.txt").read_text()
    assert text in printed and f"{len(judged)} of {len(judged)} right" in text and "0 failures" in text
    assert len(list(out.iterdir())) <= 8


@pytest.mark.parametrize(
    ("code", "said"),
    [("import time; print('at work', flush=True); time.sleep(60)", "was ended after 3 s"), ("exit(3)", "code 3")],
    ids=["late", "broken"],
)
def test_a_process_that_fails_or_lasts_is_a_row(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "SPARE", 0.1)
    with (tmp_path / "log.txt").open("a") as log:
        runner.run_stage(7, 3, tmp_path, log, ["-c", code], True, 2)
    *failed, last = rows.read(tmp_path / "rows.jsonl")
    assert [row["part"] for row in failed] == [0, 1] and all(said in row["failed"] for row in failed)
    assert last["part"] == "all" and last["took_s"] < 30
    if said != "code 3":
        assert failed[0]["trace"] == ["at work", "at work"]


def test_failures_are_rows_and_others_have_their_turn(tmp_path: Path) -> None:
    log = rows.Log(tmp_path / "rows.jsonl", 4, seconds=60)

    def fails() -> None:
        raise RuntimeError("out of something\nsecond line")

    log.each([({"what": "step", "case": "a"}, fails), ({"what": "step"}, lambda: log.row(value=float("nan")))])
    log.seconds = 0
    log.each([({"what": "fit", "recipe": "fast"}, fails)])
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"stage": 5, "unfini')
    first, second, third = rows.read(tmp_path / "rows.jsonl")
    assert first["failed"] == "RuntimeError: out of something\nsecond line" and first["case"] == "a"
    assert any("raise RuntimeError" in line for line in first["trace"])
    assert second["value"] is None and third["left_out"] == ["fit fast"]
    text = summary.summary([first, second, third])
    assert (
        "1 failures; left out for want of time: fit fast" in text and "FAILED in stage 4 step a: RuntimeError" in text
    )


def measured() -> list[dict[str, Any]]:
    """Rows as a GPU's, with numbers to be found again."""
    step = {
        "stage": 4,
        "what": "step",
        "case": "178x178, 5x256",
        "precision": "fp16",
        "right": True,
        "flops": 3 * 10**9,
    }
    kernel = {"kernel": "forward", "median_ms": 0.02, "predicted_ms": 0.01}
    return [
        {"stage": 1, "what": "environment", "gpu": "H100", "processors": 132, "torch": "2.11", "triton": "3.6.0",
         "cuda": "13.0", "date": "2027-01-01", "commit": "abc"},
        {"stage": 2, "what": "equality", "of": "values", "case": "a", "precision": "fp16", "right": False,
         "error": 0.5, "bound": 0.01, "refused": "values off"},
        {**step, "provider": "strainer_fast", "median_ms": 0.25, "p20_ms": 0.24, "p80_ms": 0.26},
        {**step, "provider": "autograd", "precision": "tf32", "refused": "cannot run: it"},
        {**step, "provider": "strainer_fast", "median_ms": 0.2, "p20_ms": 0.19, "p80_ms": 0.21},
        {"stage": 4, "what": "launches", "case": "178", "median_ms": 0.03, "predicted_ms": 0.02, "kernels": [kernel]},
        {"stage": 6, "what": "fits", "name": "paper", "count": 64, "width": 32, "fits_per_s": 1234.5, "psnr": 30.0,
         "seconds": 1.0},
        {"stage": 8, "what": "ncu", "failed": "a | b"},
    ]  # fmt: skip


def test_rows_become_tables_between_the_markers(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    target.write_text(MARKED)
    publish.publish(measured(), target)
    text = target.read_text()
    assert text.startswith("# A page\n<!-- first light: begin -->\nMeasured on H100 (132 processors), torch 2.11")
    assert text.endswith("<!-- first light: end -->\nrest\n") and "nothing" not in text
    assert "| 178x178, 5x256 | **strainer_fast** | fp16 | 200 (190 to 210) | 15 |" in text  # the repeated one alone
    assert "| 178x178, 5x256 | autograd | tf32 | - | cannot run: it |" in text
    assert "| 178 | forward | 20 | 10 | 2.00 |" in text and "| 178 | all | 30 | 20 | 1.50 |" in text
    assert "| values | fp16 | 0.5 of 0.01 | 0 of 1 |" in text and "| 64 of 3x32 | paper | 1234 |" in text
    assert "| 8 | ncu | a / b |" in text
    drawn = publish.steps_plot(measured(), "dark")
    assert drawn is not None and b"strainer_fast, fp16" in drawn


def test_a_rehearsal_is_not_published(rehearsed: tuple[Path, str], tmp_path: Path) -> None:
    path = rehearsed[0] / "rows.jsonl"
    with pytest.raises(InputError, match="a rehearsal's, whose times mean nothing"):
        publish.publish(rows.read(path), publish.PAGE)
    target = tmp_path / "page.md"
    target.write_text(MARKED)
    assert publish.main([str(path), "--page", str(target)]) == 0
    assert "### Values at points" in target.read_text()
    target.write_text("no markers")
    assert publish.main([str(path), "--page", str(target)]) == 2
    path = tmp_path / "empty.jsonl"
    path.write_text(json.dumps({"stage": 7, "what": "values"}) + "\n")
    assert publish.main([str(path), "--page", str(target)]) == 2


def test_sentences_about_what_is_not_measured_are_found(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# A\nThe kernels never ran on a GPU: they are proven.\nOther words.\n")
    assert publish.unmeasured(tmp_path) == ["docs/a.md:2: The kernels never ran on a GPU: they are proven."]


NCU = """==PROF== Connected to process 1
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","forward_kernel","gpu__time_duration.sum","nsecond","12,345"
"0","forward_kernel","launch__registers_per_thread","register/thread","128"
"1","heads_kernel","gpu__time_duration.sum","nsecond","22,345"
"2","forward_kernel","gpu__time_duration.sum","nsecond","345"
"""


def test_what_ncu_says_is_read_by_kernel_the_dearest_first() -> None:
    heads, forward = last._ncu_rows(NCU)
    assert heads == {"kernel": "heads_kernel", "gpu__time_duration": 22345.0}
    assert forward == {"kernel": "forward_kernel", "gpu__time_duration": 12345.0, "launch__registers_per_thread": 128.0}
    assert last._ncu_rows("==ERROR== ERR_NVGPUCTRPERM") == []

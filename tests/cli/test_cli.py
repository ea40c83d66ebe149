"""The verbs as a user types them: what they print, write and return."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import strainer_fast as sf
from strainer_fast.cli import app

SMALL = ("--hidden-features", "16", "--num-layers", "3")
Run = Callable[..., Any]
Rows = Callable[[Path], list[dict[str, str]]]


def test_the_whole_way(run: Run, image_folder: Path, tmp_path: Path, rows: Rows) -> None:
    encoder, fits = tmp_path / "new" / "encoder.safetensors", tmp_path / "fits"
    first = run("pretrain", image_folder, "--out", encoder, "--steps", 20, *SMALL, "--num-shared-layers", 2)
    assert first.exit_code == 0, first.output
    assert f"wrote {encoder}" in first.output
    assert f"next: strainer-fast fit NEW_IMAGES --init {encoder} --out fits" in first.output
    assert list(encoder.parent.iterdir()) == [encoder]  # no checkpoint left behind

    second = run("fit", image_folder, "--init", encoder, "--out", fits, "--steps", 15)
    assert second.exit_code == 0, second.output
    assert f"next: strainer-fast render {fits}" in second.output
    table = rows(fits / "results.csv")
    assert list(table[0]) == ["name", "height", "width", "channels", "psnr", "steps", "seconds", "stop_reason"]
    assert [r["name"] for r in table] == ["a", "b", "c"]
    assert {(r["height"], r["width"], r["channels"], r["steps"], r["stop_reason"]) for r in table} == {
        ("12", "10", "1", "15", "budget")
    }
    curves = rows(fits / "curves.csv")
    assert len(curves) == 3 * 16
    assert float(curves[15]["psnr"]) == pytest.approx(float(table[0]["psnr"]), abs=1e-3)
    result = sf.FitResult.load(fits / "weights.safetensors")
    assert [f"{p:.4f}" for p in result.psnr] == [r["psnr"] for r in table]
    with Image.open(fits / "previews" / "b.png") as preview:
        assert preview.size == (30, 12)  # truth, fit, error
        truth = np.asarray(preview)[:, :10]
    with Image.open(image_folder / "b.png") as original:
        assert np.array_equal(truth, np.asarray(original))

    third = run("render", fits, "--size", "24x20", "--out", tmp_path / "large", "--only", "b")
    assert third.exit_code == 0, third.output
    with Image.open(tmp_path / "large" / "b_24x20.png") as image:
        expected = (result.render((24, 20), indices=[1])[0].clamp(0, 1) * 255).round().numpy()
        assert np.array_equal(np.asarray(image), expected[..., 0].astype(np.uint8))
    assert sorted(p.name for p in (tmp_path / "large").iterdir()) == ["b_24x20.png"]

    for file, words in ((encoder, "trained on 3 signals of 12x10"), (fits, "recipe fast, start least_squares")):
        shown = run("inspect", file)
        assert shown.exit_code == 0
        assert words in shown.output


def test_fit_without_an_encoder(run: Run, image_folder: Path, tmp_path: Path) -> None:
    done = run("fit", image_folder / "a.png", "--init", "siren", "--out", tmp_path / "o", "--steps", 3, *SMALL)
    assert done.exit_code == 0, done.output
    assert sf.FitResult.load(tmp_path / "o" / "weights.safetensors").settings["init"] == "siren"


def test_options_reach_the_fit(run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path) -> None:
    options = (
        "--target-psnr",
        5,
        "--steps",
        400,
        "--seed",
        7,
        "--start",
        "least_squares",
        "--size",
        "8x9",
        "--threads",
        1,
    )
    threads = torch.get_num_threads()
    try:
        done = run("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", *options, "--json")
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert {s["stop_reason"] for s in data["signals"]} == {"target"}
    assert {tuple(s["shape"]) for s in data["signals"]} == {(8, 9)}
    recipe = data["settings"]["recipe"]
    assert (recipe["seed"], recipe["steps"], recipe["start"], recipe["target_psnr"]) == (7, 400, "least_squares", 5)
    assert data["settings"]["environment"]["threads"] == 1


def test_window_of_the_square(run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path) -> None:
    run("fit", image_folder / "a.png", "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2)
    done = run("render", tmp_path / "o", "--size", 5, "--window", "-1,0,0,1", "--out", tmp_path / "r")
    assert done.exit_code == 0, done.output
    result = sf.FitResult.load(tmp_path / "o" / "weights.safetensors")
    expected = (result.render(5, window=[(-1, 0), (0, 1)])[0].clamp(0, 1) * 255).round()
    with Image.open(tmp_path / "r" / "a_5x5.png") as image:
        assert np.array_equal(np.asarray(image), expected[..., 0].numpy())


def test_sixteen_bit_sources_come_back_as_sixteen_bit(run: Run, encoder_file: Path, tmp_path: Path) -> None:
    Image.fromarray(np.arange(0, 60000, 600, dtype=np.uint16).reshape(10, 10)).save(tmp_path / "deep.png")
    run("fit", tmp_path / "deep.png", "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2)
    assert run("render", tmp_path / "o", "--out", tmp_path / "r").exit_code == 0
    with Image.open(tmp_path / "r" / "deep_10x10.png") as image:
        assert image.mode == "I;16"


def test_bad_files_are_named_and_the_rest_is_done(
    run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path, rows: Rows
) -> None:
    (image_folder / "notes.txt").write_text("hello")
    whole = (image_folder / "a.png").read_bytes()
    (image_folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    done = run("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2)
    assert done.exit_code == 3
    assert f"skipped {image_folder / 'notes.txt'}: not an image that Pillow can read" in done.stderr
    assert "cut.png" in done.stderr
    assert "2 of 5 files were skipped" in done.stderr
    assert len(rows(tmp_path / "o" / "results.csv")) == 3
    trained = run("pretrain", image_folder, "--out", tmp_path / "e.safetensors", "--steps", 2, "--hidden-features", 8)
    assert trained.exit_code == 3
    assert (tmp_path / "e.safetensors").exists()


def test_grey_and_colour(run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path, rows: Rows) -> None:
    Image.fromarray(np.zeros((12, 10, 3), np.uint8)).save(image_folder / "d.png")
    done = run("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2)
    assert done.exit_code == 0, done.output
    assert [r["channels"] for r in rows(tmp_path / "o" / "results.csv")] == ["1", "1", "1", "3"]
    refused = run("pretrain", image_folder, "--out", tmp_path / "e.safetensors", "--steps", 2)
    assert refused.exit_code == 2
    assert "--channels 1 or 3" in refused.stderr
    accepted = run(
        "pretrain",
        image_folder,
        "--out",
        tmp_path / "e.safetensors",
        "--steps",
        2,
        "--channels",
        3,
        "--hidden-features",
        8,
    )
    assert accepted.exit_code == 0
    assert sf.Encoder.load(tmp_path / "e.safetensors").record["channels"] == 3


def test_quiet_says_nothing(run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path) -> None:
    done = run("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2, "--quiet")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "")


def test_json_is_the_only_thing_on_stdout(run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path) -> None:
    calls = [
        ("pretrain", image_folder, "--out", tmp_path / "e.safetensors", "--steps", 2, "--hidden-features", 8),
        ("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2),
        ("render", tmp_path / "o", "--out", tmp_path / "r"),
        ("inspect", tmp_path / "o"),
        ("doctor",),
    ]
    for call in calls:
        done = run(*call, "--json")
        assert done.exit_code == 0, done.output
        assert isinstance(json.loads(done.stdout), dict)


def test_exact_is_null_in_json(tmp_path: Path) -> None:
    from strainer_fast.fitting.result import FittedSignal, signal_data

    data = signal_data(FittedSignal("x", (1, 1), 1, (0, 1), "f", math.inf, 3, 0.1, "budget"))
    assert json.loads(json.dumps(data, allow_nan=False))["psnr"] is None
    assert data["exact"] is True


def test_same_command_again(run: Run, image_folder: Path, tmp_path: Path, rows: Rows) -> None:
    encoder, fits = tmp_path / "e.safetensors", tmp_path / "fits"
    pretrain = ("pretrain", image_folder, "--out", encoder, "--steps", 4, *SMALL, "--num-shared-layers", 2)
    assert run(*pretrain).exit_code == 0
    before = encoder.stat().st_mtime_ns
    again = run(*pretrain)
    assert (again.exit_code, encoder.stat().st_mtime_ns) == (0, before)
    assert "complete already" in again.output
    other = run(*pretrain, "--seed", 3)
    assert other.exit_code == 2
    assert "an encoder of another run" in other.stderr
    assert run(*pretrain, "--seed", 3, "--overwrite").exit_code == 0

    fit = ("fit", image_folder, "--init", encoder, "--out", fits, "--steps", 4)
    assert run(*fit).exit_code == 0
    table = rows(fits / "results.csv")
    again = run(*fit)
    assert again.exit_code == 0
    assert "3 of 3 are in" in again.output
    assert rows(fits / "results.csv") == table
    other = run("fit", image_folder, "--init", encoder, "--out", fits, "--steps", 5)
    assert other.exit_code == 2
    assert "recipe.steps 4 -> 5" in other.stderr
    assert rows(fits / "results.csv") == table
    assert run("fit", image_folder, "--init", encoder, "--out", fits, "--steps", 5, "--overwrite").exit_code == 0
    Image.fromarray(np.zeros((12, 10), np.uint8)).save(image_folder / "d.png")
    assert run("fit", image_folder, "--init", encoder, "--out", fits, "--steps", 5).exit_code == 0
    assert len(rows(fits / "results.csv")) == 4


def test_two_images_of_one_name(run: Run, encoder_file: Path, tmp_path: Path) -> None:
    for folder, value in (("one", 10), ("two", 200)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((6, 6), value, np.uint8)).save(tmp_path / folder / "x.png")
    done = run("fit", tmp_path / "one", tmp_path / "two", "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2)
    assert done.exit_code == 0
    assert sorted(p.name for p in (tmp_path / "o" / "previews").iterdir()) == ["x-2.png", "x.png"]


def test_bundled_samples(run: Run, tmp_path: Path, rows: Rows) -> None:
    done = run("fit", "samples:photos/test", "--size", 6, "--out", tmp_path / "o", "--steps", 1, *SMALL)
    assert done.exit_code == 0, done.output
    assert len(rows(tmp_path / "o" / "results.csv")) == 10


@pytest.mark.parametrize("verb", ["fit", "pretrain"])
def test_ctrl_c_in_a_real_process(verb: str, tmp_path: Path, rows: Rows) -> None:
    out = tmp_path / ("o" if verb == "fit" else "e.safetensors")
    command = [sys.executable, "-c", "from strainer_fast.cli import main; main()", verb, "samples:brain-mri/test"]
    command += ["--size", "16", "--steps", "20000", "--hidden-features", "16", "--out", str(out)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "steps" in line:
            break
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in err
    assert "again" in err
    if verb == "fit":
        assert {r["stop_reason"] for r in rows(out / "results.csv")} == {"interrupted"}
    else:
        assert out.with_name(out.name + ".checkpoint").exists()
        shown = CliRunner().invoke(app, ["inspect", str(out) + ".checkpoint"])
        assert "of 20000 steps done" in shown.output


def test_progress_in_a_pipe_is_lines(
    monkeypatch: pytest.MonkeyPatch, run: Run, image_folder: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("strainer_fast.cli._console.PLAIN_SECONDS", 0.0)
    done = run(
        *("fit", image_folder / "a.png", "--out", tmp_path / "o", "--steps", 30, "--implementation", "tiled", *SMALL),
        *("--recipe", "paper"),
    )
    lines = [line for line in done.output.splitlines() if line.startswith("fitting: ") and " dB " in line]
    assert [line.split()[1] for line in lines] == ["10/30", "20/30"]
    assert all(line.endswith("s left") for line in lines)
    assert "\r" not in done.output
    assert "\x1b" not in done.output


def test_progress_on_a_terminal_is_a_bar(image_folder: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    master, slave = pty.openpty()
    command = [sys.executable, "-c", "from strainer_fast.cli import main; main()", "fit", str(image_folder)]
    command += ["--steps", "40", "--out", str(tmp_path / "o"), *SMALL]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    seen = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # the other end is closed
            break
        if not chunk:
            break
        seen += chunk
    os.close(master)
    assert process.wait() == 0
    text = seen.decode()
    assert "━" in text
    assert "120/120" in text
    assert "dB" in text


def test_doctor_says_what_runs(run: Run) -> None:
    done = run("doctor")
    facts = {line.split("  ")[0]: line.split("  ")[-1].strip() for line in done.output.splitlines()}
    assert facts["strainer_fast"] == sf.__version__
    assert any(facts["runs"].startswith(way) for way in ("native on cpu: ", "tiled on cpu: ", "triton on cuda"))
    if not torch.cuda.is_available():
        assert "no GPU" in facts["triton kernels"]
        assert facts["layers"] == "PyTorch's own operations"
    assert "step by step" in facts["fit, 178x178 colour, 5x256"]
    assert facts["fit, 28x28 grey, 3x32"]


def test_recipes_says_what_each_is_for(run: Run) -> None:
    result = run("recipes")
    assert result.exit_code == 0
    for name in sf.fitting.PRESETS:
        assert f"\n{name}: " in f"\n{result.output}"
    assert "optimiser = kfac" in result.output
    one = run("recipes", "fast", "--json")
    assert json.loads(one.stdout) == sf.recipe("fast").as_dict()
    assert run("recipes", "slow").exit_code == 2


def test_a_field_of_the_recipe(run: Run, image_folder: Path, tmp_path: Path) -> None:
    fields = ("--set", "optimiser=muon", "--set", "learning_rate=1e-3", "--set", "steps=9", "--set", "guard_db=null")
    result = run("fit", image_folder, "--out", tmp_path / "fits", *fields, "--steps", 3, *SMALL, "--json")
    assert result.exit_code == 0, result.output
    recipe = json.loads(result.stdout)["settings"]["recipe"]
    assert (recipe["optimiser"], recipe["learning_rate"], recipe["steps"]) == ("muon", 1e-3, 3)
    for bad, message in (("rate=1", "Check the spelling"), ("steps", "FIELD=VALUE"), ("steps=many", "integer")):
        wrong = run("fit", image_folder, "--out", tmp_path / "no", "--set", bad)
        assert wrong.exit_code == 2
        assert message in wrong.output


def test_pretraining_on_noise(run: Run, image_folder: Path, tmp_path: Path) -> None:
    noise = ("pretrain", "--source", "noise:uniform", "--noise-count", 2, "--size", "9x8", "--steps", 3, *SMALL)
    result = run(*noise, "--out", tmp_path / "noise.safetensors", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["record"]["signals"] == ["noise-uniform-0", "noise-uniform-1"]
    both = ("pretrain", image_folder, "--source", "images+noise:spectrum", "--noise-count", 1, "--steps", 3, *SMALL)
    result = run(*both, "--noise-amplitude", "0.3", "--out", tmp_path / "both.safetensors", "--json")
    record = json.loads(result.stdout)["record"]
    assert record["signals"] == ["a", "b", "c", "noise-spectrum-0"]
    assert record["shape"] == [12, 10]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--source", "noise:uniform"), "a --size for noise"),
        (("--source", "noise:white", "--size", "8"), "'uniform', 'gaussian'"),
        (("--source", "noise"), "noise:KIND"),
        (("--source", "photos+noise:uniform"), "noise:KIND"),
        ((), "image files or folders"),
        (("IMAGES", "--source", "noise:uniform", "--size", "8"), "no images"),
        (("--source", "noise:uniform", "--size", "8", "--noise-amplitude", "3"), "amplitude"),
    ],
)
def test_bad_sources(arguments: tuple[str, ...], message: str, run: Run, image_folder: Path, tmp_path: Path) -> None:
    given = [str(image_folder) if a == "IMAGES" else a for a in arguments]
    result = run("pretrain", *given, "--out", tmp_path / "no.safetensors")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "no.safetensors").exists()

"""The verbs as a user types them: what they print, write and return."""

import csv
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


@pytest.fixture
def run() -> Run:
    def call(*arguments: object) -> Any:
        return CliRunner().invoke(app, [str(a) for a in arguments])

    return call


@pytest.fixture
def encoder_file(encoder: sf.Encoder, tmp_path: Path) -> Path:
    path = tmp_path / "trained.safetensors"
    encoder.save(path)
    return path


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_whole_way(run: Run, image_folder: Path, tmp_path: Path) -> None:
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

    for file, words in ((encoder, "trained on 3 signals of 12x10"), (fits, "recipe paper, start random")):
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
    run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path
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


def test_grey_and_colour(run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path) -> None:
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


def test_same_command_again(run: Run, image_folder: Path, tmp_path: Path) -> None:
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


def test_bundled_samples(run: Run, tmp_path: Path) -> None:
    done = run("fit", "samples:photos/test", "--size", 6, "--out", tmp_path / "o", "--steps", 1, *SMALL)
    assert done.exit_code == 0, done.output
    assert len(rows(tmp_path / "o" / "results.csv")) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "{tmp}/missing"], "nothing there"),
        (["fit", "{tmp}/empty"], "no files in it"),
        (["fit", "{tmp}/text"], "none of the 1 files could be read"),
        (["fit", "{img}", "--size", "0"], "1 to 16384 pixels a side"),
        (["fit", "{img}", "--size", "99999999x2"], "1 to 16384 pixels a side"),
        (["fit", "{img}", "--size", "axb"], "--size: expected HxW"),
        (["fit", "{img}", "--size", "3000", "--implementation", "torch"], "of free memory"),
        (["fit", "{img}", "--size", "16384x16384"], "at most 67,108,864 pixels"),
        (["fit", "{img}", "--value-range", "1"], "--value-range: expected 2 numbers"),
        (["fit", "{img}", "--steps", "-1"], "steps"),
        (["fit", "{img}", "--recipe", "magic"], "recipe: expected one of 'paper'"),
        (["fit", "{img}", "--start", "mean"], "not trained"),
        (["fit", "{img}", "--omega", "x"], "--omega"),
        (["fit", "{img}", "--omega", "30,30"], "each of the 5 sine layers"),
        (
            ["fit", "{img}", "--implementation", "triton"],
            "implementation: expected one of 'auto', 'tiled', 'torch', got 'triton'",
        ),
        (["fit", "{img}", "--alpha", "pink"], "alpha: expected one of"),
        (["fit", "{img}", "--init", "{tmp}/text/notes.txt"], "a complete safetensors file"),
        (["fit", "{img}", "--init", "nowhere.safetensors"], "which is no file"),
        (["fit", "samples:cats"], "samples: expected one of"),
    ],
)
def test_unusable_input_fails_before_work(
    run: Run, arguments: list[str], message: str, image_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "notes.txt").write_text("hello")
    filled = [a.format(tmp=tmp_path, img=image_folder) for a in arguments]
    done = run(*filled, "--out", tmp_path / "o")
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "o").glob("*"))


def test_unusable_outputs(run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        done = run("fit", image_folder, "--init", encoder_file, "--out", out, "--steps", 2)
        assert done.exit_code == 2
        assert "folder" in done.stderr
    assert run("pretrain", image_folder, "--out", tmp_path).exit_code == 2
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "weights.safetensors").write_text("somebody else's")
    done = run("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2)
    assert done.exit_code == 2
    assert "--overwrite" in done.stderr
    assert (tmp_path / "o" / "weights.safetensors").read_text() == "somebody else's"
    for arguments in (["render", encoder_file, "--out", tmp_path / "r"], ["inspect", tmp_path / "file"]):
        assert run(*arguments).exit_code == 2


def test_a_full_disk_is_found_first(
    run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    done = run("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2)
    assert done.exit_code == 2
    assert "1,000 in" in done.stderr


def test_a_disk_that_fills_up_later_is_an_error_and_keeps_the_old_file(
    run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", "--steps", 2)
    assert run(*command).exit_code == 0
    before = (tmp_path / "o" / "weights.safetensors").read_bytes()
    Image.fromarray(np.zeros((12, 10), np.uint8)).save(image_folder / "d.png")
    real = os.fsync
    calls = iter(range(100))

    def full(descriptor: int) -> None:
        if next(calls) >= 1:  # after the write test of the folder
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    done = run(*command)
    assert done.exit_code == 1
    assert "No space left" in done.stderr
    assert (tmp_path / "o" / "weights.safetensors").read_bytes() == before


def test_other_dimension_than_the_encoders(run: Run, image_folder: Path, tmp_path: Path) -> None:
    volume = sf.Signal(torch.rand(4, 4, 4, 1))
    encoder = sf.pretrain(volume, sf.recipe(pretrain_steps=1), architecture=sf.Architecture(8, 3, 2))
    encoder.save(tmp_path / "volume.safetensors")
    done = run("fit", image_folder, "--init", tmp_path / "volume.safetensors", "--out", tmp_path / "o")
    assert done.exit_code == 2
    assert "3 coordinates per point, as the encoder has" in done.stderr


@pytest.mark.parametrize("verb", ["fit", "pretrain"])
def test_ctrl_c_in_a_real_process(verb: str, tmp_path: Path) -> None:
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
    done = run("fit", image_folder / "a.png", "--out", tmp_path / "o", "--steps", 30, *SMALL)
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
    assert "tiled on cpu: " in done.output or "torch on cuda" in done.output
    assert f"strainer_fast  {sf.__version__}" in done.output


def test_overwrite_keeps_the_old_until_the_new_is_there(
    run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    out, encoder = tmp_path / "o", tmp_path / "e.safetensors"
    assert run("fit", image_folder, "--init", encoder_file, "--out", out, "--steps", 2).exit_code == 0
    assert run("pretrain", image_folder, "--out", encoder, "--steps", 2, *SMALL).exit_code == 0
    before = (out / "weights.safetensors").read_bytes(), encoder.read_bytes()
    Image.fromarray(np.zeros((5, 5, 3), np.uint8)).save(image_folder / "d.png")
    refused = run("fit", image_folder, "--init", encoder_file, "--out", out, "--start", "mean", "--overwrite")
    assert refused.exit_code == 2
    assert run("pretrain", image_folder, "--out", encoder, "--overwrite").exit_code == 2
    assert before == ((out / "weights.safetensors").read_bytes(), encoder.read_bytes())


def test_write_test_touches_no_file_of_the_users(
    run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "o"
    out.mkdir()
    for name in ("write-test", "notes"):
        (out / name).write_text("precious")
    assert run("fit", image_folder, "--init", encoder_file, "--out", out, "--steps", 1).exit_code == 0
    assert {p.name for p in out.iterdir()} == {
        "write-test", "notes", "weights.safetensors", "results.csv", "curves.csv", "previews",
    }  # fmt: skip
    assert (out / "write-test").read_text() == "precious"


def test_a_fit_file_cannot_write_outside_the_folder(encoder: sf.Encoder, tmp_path: Path) -> None:
    from dataclasses import replace

    result = sf.fit(sf.Signal(torch.rand(4, 4, 1), "x"), encoder, sf.recipe(steps=1))
    for name in ("../escaped", str(tmp_path / "absolute"), "a/b", ".hidden"):
        evil = replace(result, signals=(replace(result.signals[0], name=name),))
        evil.save(tmp_path / "evil.safetensors")
        with pytest.raises(sf.InputError, match="no safe file names"):
            sf.FitResult.load(tmp_path / "evil.safetensors")


def test_incomplete_metadata_is_named(run: Run, tmp_path: Path) -> None:
    from strainer_fast._files import write_tensors

    for kind in ("encoder", "fit", "pre-training"):
        write_tensors(tmp_path / "x.safetensors", kind, {"a": torch.zeros(1)}, {})
        done = run("inspect", tmp_path / "x.safetensors")
        assert (done.exit_code, "complete metadata" in done.stderr) == (2, True)


def test_network_options_beside_an_encoder_are_refused(
    run: Run, encoder_file: Path, image_folder: Path, tmp_path: Path
) -> None:
    done = run("fit", image_folder, "--init", encoder_file, "--out", tmp_path / "o", "--omega", 5)
    assert done.exit_code == 2
    assert "The encoder brings its own" in done.stderr


def test_fewer_layers_share_fewer(run: Run, image_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "e.safetensors"
    assert (
        run("pretrain", image_folder, "--out", out, "--steps", 1, "--num-layers", 4, "--hidden-features", 8).exit_code
        == 0
    )
    assert sf.Encoder.load(out).architecture.num_shared_layers == 3


def test_float_tiff_with_a_value_range(run: Run, encoder_file: Path, tmp_path: Path) -> None:
    Image.fromarray(np.linspace(-100, 300, 36, dtype=np.float32).reshape(6, 6)).save(tmp_path / "x.tiff")
    command = ("fit", tmp_path / "x.tiff", "--init", encoder_file, "--out", tmp_path / "o", "--steps", 1)
    assert run(*command).exit_code == 2
    done = run(*command, "--value-range", "-100,300")
    assert done.exit_code == 0, done.output
    assert sf.FitResult.load(tmp_path / "o" / "weights.safetensors").signals[0].value_range == (-100.0, 300.0)


def test_killed_fits_keep_what_is_finished(encoder_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "o"
    command = [sys.executable, "-c", "from strainer_fast.cli import main; main()", "fit", "samples:brain-mri/test"]
    command += ["--init", str(encoder_file), "--size", "16", "--steps", "1000000", "--out", str(out)]
    # The first scans get there within seconds, the others are killed on their way.
    command += ["--target-psnr", "22", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "results.csv").exists():
        time.sleep(0.02)
    process.kill()
    process.wait()
    kept = sf.FitResult.load(out / "weights.safetensors")
    assert set(kept.stop_reasons) == {"target"}

"""The command line with bad input, full disks, kills and files from strangers: clear errors, nothing lost."""

import os
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

import strainer_fast as sf

SMALL = ("--hidden-features", "16", "--num-layers", "3")
Run = Callable[..., Any]
Rows = Callable[[Path], list[dict[str, str]]]


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
            "implementation: expected 'triton' where it can run, got CPU tensors",
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
    encoder = sf.pretrain(volume, sf.recipe("paper", pretrain_steps=1), architecture=sf.Architecture(8, 3, 2))
    encoder.save(tmp_path / "volume.safetensors")
    done = run("fit", image_folder, "--init", tmp_path / "volume.safetensors", "--out", tmp_path / "o")
    assert done.exit_code == 2
    assert "3 coordinates per point, as the encoder has" in done.stderr


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

    result = sf.fit(sf.Signal(torch.rand(4, 4, 1), "x"), encoder, sf.recipe("paper", steps=1))
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

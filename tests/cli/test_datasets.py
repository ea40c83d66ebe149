"""The verbs fit-dataset, verify and export, as a person types them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from strainer_fast.datasets import FittedDataset

SMALL = ["--hidden-features", "16", "--num-layers", "3", "--recipe", "small", "--steps", "5"]


def test_a_data_set_from_file_to_export(run: Any, tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(12))
    out = tmp_path / "networks"
    done = run("fit-dataset", tmp_path / "images.npz", "--out", out, *SMALL, "--shard", "0/2")
    assert done.exit_code == 0, done.output
    assert "6 signals fitted" in done.output and "fits/s" in done.output and "6 by budget" in done.output
    rest = run("fit-dataset", tmp_path / "images.npz", "--out", out, *SMALL, "--shard", "1/2", "--json")
    assert json.loads(rest.stdout)["networks"] == 12
    again = run("fit-dataset", tmp_path / "images.npz", "--out", out, *SMALL)
    assert again.exit_code == 2 and "holds a data set" in again.stderr
    resumed = run("fit-dataset", tmp_path / "images.npz", "--out", out, *SMALL, "--resume", "--json")
    assert resumed.exit_code == 0 and json.loads(resumed.stdout)["fitted"] == 0
    checked = run("verify", out, "--json")
    assert checked.exit_code == 0
    assert json.loads(checked.stdout) == {
        "checked": 12,
        "same_bits": 12,
        "worst_db": 0.0,
        "wrong": 0,
        "changed": 0,
        "missing": 0,
    }
    exported = run("export", out, "--out", tmp_path / "all.npz")
    assert exported.exit_code == 0 and "12 networks" in exported.output
    with np.load(tmp_path / "all.npz") as arrays:
        assert np.array_equal(arrays["weights"], FittedDataset(out).flat_weights().numpy())
    images[3] = 255 - images[3]
    np.savez(tmp_path / "images.npz", x=images, y=np.arange(12))
    changed = run("verify", out)
    assert changed.exit_code == 1 and "values have changed" in changed.stderr


def test_files_that_cannot_be_read_are_named(run: Any, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "broken.png").write_bytes(b"no")
    done = run("fit-dataset", image_folder, "--out", tmp_path / "out", *SMALL, "--init", "shared")
    assert done.exit_code == 3
    assert "1 files were skipped" in done.stderr
    assert "broken.png" in (tmp_path / "out" / "skipped.csv").read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shard", "2/2"], "--shard"),
        (["--num-parallel", "many"], "--num-parallel"),
        (["--image-shape", "3"], "--image-shape"),
        (["--init", "missing.safetensors"], "no file"),
    ],
)
def test_bad_options(run: Any, options: list[str], message: str, image_folder: Path, tmp_path: Path) -> None:
    done = run("fit-dataset", image_folder, "--out", tmp_path / "out", *options)
    assert done.exit_code == 2 and message in done.stderr
    assert not (tmp_path / "out").exists()

"""Files: whole or not there, and read with distrust."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import strainer_fast as sf
from strainer_fast import _files


@pytest.fixture
def saved(encoder: sf.Encoder, tmp_path: Path) -> Path:
    path = tmp_path / "encoder.safetensors"
    encoder.save(path)
    return path


def edit(path: Path, change: Callable[[dict], None]) -> None:
    """Change the JSON document in a safetensors header, keeping the data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    document = json.loads(header["__metadata__"]["strainer_fast"])
    change(document)
    header["__metadata__"]["strainer_fast"] = json.dumps(document)
    new = json.dumps(header).encode()
    new += b" " * (-len(new) % 8)
    path.write_bytes(struct.pack("<Q", len(new)) + new + raw[8 + length :])


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_cut_short(saved: Path, keep: int) -> None:
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(sf.InputError, match=r"a complete safetensors file.*cut short"):
        sf.Encoder.load(saved)


def test_not_ours(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(sf.InputError, match="a file written by strainer_fast"):
        sf.Encoder.load(path)
    path.write_text("hello")
    with pytest.raises(sf.InputError, match="a complete safetensors file"):
        sf.Encoder.load(path)
    with pytest.raises(sf.InputError, match="which is no file"):
        sf.Encoder.load(tmp_path / "missing")
    with pytest.raises(sf.InputError, match="which is no file"):
        sf.Encoder.load(tmp_path)


def test_another_format_version(saved: Path) -> None:
    edit(saved, lambda d: d.update(format_version=99, package_version="9.9"))
    with pytest.raises(sf.InputError, match=r"format version 1, got version 99 \(written by strainer_fast 9.9\)"):
        sf.Encoder.load(saved)


def test_another_kind(saved: Path) -> None:
    with pytest.raises(sf.InputError, match="a fit file, got an encoder file"):
        sf.FitResult.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.pop("architecture"),
        lambda d: d["architecture"].update(hidden_features=10**7),
        lambda d: d["architecture"].update(hidden_features=31),
        lambda d: d["architecture"].update(num_layers=9),
        lambda d: d["architecture"].update(omega=[30.0]),
        lambda d: d["architecture"].update(omega=[-1.0] * 3),
        lambda d: d["architecture"].update(omega="x"),
        lambda d: d["architecture"].update(surprise=1),
        lambda d: d.update(architecture=[]),
        lambda d: d.update(in_features=3),
        lambda d: d.update(in_features=10**9),
        lambda d: d.update(decoders=[10**12, 1]),
        lambda d: d.update(decoders=None),
        lambda d: d.update(decoders="xx"),
    ],
)
def test_metadata_that_lie(saved: Path, change: Callable[[dict], None]) -> None:
    edit(saved, change)
    with pytest.raises(sf.InputError):
        sf.Encoder.load(saved)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(signals=[]),
        lambda d: d["signals"].pop(),
        lambda d: d["signals"][0].update(channels=10**9),
        lambda d: d["signals"][0].update(shape=[4]),
        lambda d: d["signals"][0].pop("name"),
        lambda d: d.update(curve_lengths=[3]),
        lambda d: d.update(curve_lengths=[10**12, -(10**12)]),
    ],
)
def test_fit_metadata_that_lie(
    change: Callable[[dict], None], encoder: sf.Encoder, unseen: list[sf.Signal], tmp_path: Path
) -> None:
    path = tmp_path / "fit.safetensors"
    sf.fit(unseen[:2], encoder, sf.recipe("paper", steps=1)).save(path)
    edit(path, change)
    with pytest.raises(sf.InputError):
        sf.FitResult.load(path)


def test_weights_that_are_not_finite(encoder: sf.Encoder, tmp_path: Path) -> None:
    import copy

    broken = copy.deepcopy(encoder)
    with torch.no_grad():
        broken.layers[0].weight[0, 0] = float("nan")
    broken.save(tmp_path / "nan.safetensors")
    with pytest.raises(sf.InputError, match=r"finite weights, got NaN or infinity in encoder\.layers\.0\.weight"):
        sf.Encoder.load(tmp_path / "nan.safetensors")


def test_a_failed_write_leaves_the_old_file(saved: Path, monkeypatch: pytest.MonkeyPatch, encoder: sf.Encoder) -> None:
    before = saved.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        encoder.save(saved)
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_unwritable_output_is_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _files.check_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(sf.InputError, match="a folder that can be written"):
        _files.check_writable(tmp_path / "file" / "below")
    with pytest.raises(sf.InputError, match="bytes free"):
        _files.check_writable(tmp_path, needed_bytes=2**70)

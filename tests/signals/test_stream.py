"""Data sets read signal by signal: every layout, and what is said when a file is not what it seems."""

import gzip
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import strainer_fast as sf
from strainer_fast.signals import Skipped
from strainer_fast.signals.stream import stream

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 6, 6), dtype=np.uint8)


def idx(path: Path, array: np.ndarray, code: int, packed: bool = False) -> Path:
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    data = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(data) if packed else data)
    return path


def csv(path: Path, rows: np.ndarray, header: str = "") -> Path:
    lines = [header] * bool(header) + [",".join(map(str, row)) for row in rows]
    data = "\n".join(lines) + "\n"
    path.write_bytes(gzip.compress(data.encode()) if path.suffix == ".gz" else data.encode())
    return path


def saved(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)
    return path


FLAT = IMAGES.reshape(5, -1)
LABELLED = np.concatenate([FLAT, np.arange(5)[:, None]], 1)
LAYOUTS: dict[str, Callable[[Path], tuple[Any, dict[str, Any]]]] = {
    "npy": lambda d: (np.save(d / "a.npy", IMAGES) or d / "a.npy", {}),
    "npy with channels": lambda d: (np.save(d / "a.npy", IMAGES[..., None]) or d / "a.npy", {}),
    "npz": lambda d: (saved(d / "a.npz", x=IMAGES, labels=np.arange(5)), {}),
    "npz by key": lambda d: (saved(d / "a.npz", x=IMAGES, y=IMAGES[:2]), {"key": "x"}),
    "idx": lambda d: (idx(d / "images-idx3-ubyte", IMAGES, 8), {}),
    "idx, packed": lambda d: (idx(d / "images-idx3-ubyte.gz", IMAGES, 8, True), {}),
    "idx of int32": lambda d: (idx(d / "i", IMAGES.astype(np.int32), 12), {"value_range": (0, 255)}),
    "csv": lambda d: (csv(d / "a.csv", FLAT), {}),
    "csv, packed": lambda d: (csv(d / "a.csv.gz", FLAT), {}),
    "csv with a header and labels": lambda d: (csv(d / "a.csv", LABELLED, "p" + ",x" * 36), {"label_column": -1}),
    "csv with a shape": lambda d: (csv(d / "a.csv", FLAT), {"image_shape": (6, 6)}),
    "array": lambda d: (IMAGES, {}),
    "tensor": lambda d: (torch.from_numpy(IMAGES), {}),
    "list": lambda d: (list(IMAGES), {}),
    "generator": lambda d: ((image for image in IMAGES), {}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_signals(layout: str, tmp_path: Path) -> None:
    source, options = LAYOUTS[layout](tmp_path)
    opened = stream(source, **options)
    found = list(opened.read())
    assert [index for index, _, _ in found] == list(range(5))
    assert opened.number in (5, None)
    for (_, _, signal), image in zip(found, IMAGES, strict=True):
        assert isinstance(signal, sf.Signal)
        assert signal.shape == (6, 6) and signal.channels == 1
        torch.testing.assert_close(signal.values[..., 0], torch.from_numpy(image / 255).float())
        assert signal.value_range == (0.0, 255.0)


def test_only_what_is_wanted_is_read(image_folder: Path) -> None:
    (image_folder / "b.png").write_bytes(b"broken")
    opened = stream(image_folder, size=4)
    assert opened.number == 3
    assert [i for i, _, _ in opened.read(lambda i: i != 1)] == [0, 2]
    (_, source, skipped), *_ = opened.read(lambda i: i == 1)
    assert source == "b.png" and isinstance(skipped, Skipped) and "not an image" in skipped.reason
    assert next(iter(opened.read()))[2].shape == (4, 4)


def test_the_description_tells_data_sets_apart(image_folder: Path, tmp_path: Path) -> None:
    first = stream(image_folder).description
    assert stream(image_folder).description == first
    (image_folder / "c.png").rename(image_folder / "d.png")
    assert stream(image_folder).description != first
    assert stream(IMAGES).description != stream(IMAGES[:4]).description
    assert stream(IMAGES).description != stream(IMAGES, size=4).description


def test_an_iterator_is_read_once() -> None:
    opened = stream(image for image in IMAGES)
    assert len(list(opened.read())) == 5
    with pytest.raises(sf.InputError, match="one that is spent"):
        list(opened.read())


BAD: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "nothing": (lambda d: d / "no.npy", {}, "nothing there"),
    "an empty folder": (lambda d: d, {}, "no files in it"),
    "one image": (lambda d: np.zeros((6, 6)), {}, "images \\[N, H, W\\]"),
    "objects": (lambda d: np.save(d / "o.npy", np.array([{}])) or d / "o.npy", {}, "cannot be read"),
    "two arrays": (lambda d: saved(d / "a.npz", x=IMAGES, y=IMAGES), {}, "Pass key=, one of: x \\[5, 6, 6\\]"),
    "no such key": (lambda d: saved(d / "a.npz", x=IMAGES), {"key": "z"}, "got z"),
    "a broken npz": (lambda d: (d / "a.npz").write_bytes(b"PK") and d / "a.npz", {}, "cannot be read"),
    "no square": (lambda d: csv(d / "a.csv", LABELLED), {}, "37 columns"),
    "another shape": (lambda d: csv(d / "a.csv", FLAT), {"image_shape": (6, 7)}, "6x7 of pixels a line"),
    "no source": (lambda d: 3, {}, "got int"),
    "bad size": (lambda d: IMAGES, {"size": 0}, "size"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_opened_is_refused(case: str, tmp_path: Path) -> None:
    make, options, message = BAD[case]
    with pytest.raises(sf.InputError, match=message):
        stream(make(tmp_path), **options)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_that_is_cut_short_is_named_when_its_end_is_reached(packed: bool, tmp_path: Path) -> None:
    path = idx(tmp_path / "images", IMAGES, 8)
    data = path.read_bytes()[:-10]
    if packed:
        path = tmp_path / "images.gz"
    path.write_bytes(gzip.compress(data) if packed else data)
    opened = stream(path)
    seen = []
    with pytest.raises(sf.InputError, match="5 images, got 4, then the end"):
        seen.extend(opened.read())
    lines = csv(tmp_path / "a.csv", FLAT).read_text().splitlines()
    (tmp_path / "a.csv").write_text("\n".join([*lines[:3], lines[3][:20]]))
    with pytest.raises(sf.InputError, match=r"image 3: expected 36 pixels"):
        list(stream(tmp_path / "a.csv").read())
    (tmp_path / "a.csv").write_text("\n".join([*lines[:3], lines[3].replace(",", ",x", 1)]))
    with pytest.raises(sf.InputError, match=r"image 3: expected numbers"):
        list(stream(tmp_path / "a.csv").read())

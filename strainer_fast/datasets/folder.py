"""The folder of a fitted data set: what lies in it, and how a shard of networks is written and read.

    dataset.json             settings and source, written first
    shards/00000.safetensors networks stacked [n, ...] and what is known of each, whole or not there
    shards/00000.part        networks of a shard that is not full yet, one after the other; see journal.py
    index.csv                a line per network (and index.parquet where pyarrow is installed)
    skipped.csv              files that could not be read

Several processes may fill one folder, each its own part of the signals ("2of8"): their files have that in the name.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from strainer_fast._checks import bad_input, check_count
from strainer_fast._files import FORMAT_VERSION, Shapes, atomic_writer, read_metadata, read_tensors, write_tensors
from strainer_fast._version import __version__
from strainer_fast.fitting.result import FittedSignal, signal_data, signal_from_data
from strainer_fast.models import Architecture
from strainer_fast.models.encoder import MAX_CHANNELS, MAX_COORDINATES

MANIFEST, SHARDS, INDEX, SKIPPED = "dataset.json", "shards", "index.csv", "skipped.csv"
SHARD, PART = ".safetensors", ".part"
KIND = "dataset shard"
COLUMNS = (
    *("index", "source", "size", "channels", "psnr", "steps", "seconds", "stop_reason", "fingerprint"),
    *("shard", "row"),
)
MAX_ROWS = 2**20
"""Bound on a stored number, against files that ask for absurd allocations."""


@dataclass(frozen=True)
class Row:
    """A fitted signal of a data set.

    Args:
        index: place of the signal in the source, from 0; skipped files count.
        source: file name, or "signal-0000012" for what has none.
        signal: what is known of the fit.
    """

    index: int
    source: str
    signal: FittedSignal

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"index": self.index, "source": self.source, **signal_data(self.signal)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """What `as_dict` gave."""
        return cls(check_count("index", data["index"], 0), str(data["source"]), signal_from_data(data))


def parameter_shapes(architecture: Architecture, in_features: int, channels: int) -> Shapes:
    """Shape of every parameter of one network, by name, in the order of Siren.parameters()."""
    shapes: Shapes = {}
    for i, (out, width) in enumerate(architecture.layer_shapes(in_features)):
        shapes |= {f"layers.{i}.weight": (out, width), f"layers.{i}.bias": (out,)}
    return shapes | {"head.weight": (channels, architecture.hidden_features), "head.bias": (channels,)}


def write_shard(path: Path, architecture: Architecture, rows: Sequence[Row], weights: dict[str, Tensor]) -> None:
    """Rows and their stacked networks as one file."""
    metadata = {
        "architecture": architecture.as_dict(),
        "in_features": len(rows[0].signal.shape),
        "channels": rows[0].signal.channels,
        "rows": [row.as_dict() for row in rows],
    }
    write_tensors(path, KIND, weights, metadata)


def read_rows(path: Path) -> list[Row]:
    """What is known of the networks of a shard, without the networks."""
    document = read_metadata(path)
    try:
        if document["kind"] != KIND:
            raise ValueError(f"a {document['kind']} file")
        return [Row.from_dict(data) for data in document["rows"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise bad_input(str(path), "a shard of a data set", error, "The file is damaged.") from None


def read_shard(path: Path) -> tuple[dict[str, Tensor], list[Row], Architecture]:
    """Stacked networks, what is known of each, and their sizes.

    Raises InputError for a file that is missing, damaged or not a shard.
    """
    tensors, document = read_tensors(path, KIND, _shapes)
    return tensors, [Row.from_dict(data) for data in document["rows"]], Architecture(**document["architecture"])


def _shapes(document: dict[str, Any]) -> Shapes:
    architecture = Architecture(**document["architecture"])
    in_features = check_count("in_features", document["in_features"], 1, MAX_COORDINATES)
    channels = check_count("channels", document["channels"], 1, MAX_CHANNELS)
    number = check_count("rows", len(document["rows"]), 1, MAX_ROWS)
    each = parameter_shapes(architecture, in_features, channels)
    return {name: (number, *shape) for name, shape in each.items()}


def shard_paths(folder: Path) -> list[Path]:
    """The shards that are there, in order of name."""
    return sorted((folder / SHARDS).glob(f"*{SHARD}"))


def write_manifest(folder: Path, settings: dict[str, Any]) -> None:
    """dataset.json: what all networks of the folder share."""
    document = {"kind": "dataset", "format_version": FORMAT_VERSION, "package_version": __version__, **settings}
    with atomic_writer(folder / MANIFEST) as file:
        file.write(json.dumps(document, indent=1, allow_nan=False).encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote.

    Raises InputError for a folder without one, or one of another format version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise bad_input(str(folder), "a folder that fit_dataset wrote", f"no {MANIFEST} in it", "Check the path.")
    document: Any = None
    with suppress(OSError, json.JSONDecodeError, RecursionError, UnicodeDecodeError):
        document = json.loads(path.read_text())
    if not isinstance(document, dict) or document.get("kind") != "dataset":
        raise bad_input(str(path), "the description of a data set", "something else", "The file is damaged.")
    if document.get("format_version") != FORMAT_VERSION:
        got = f"version {document.get('format_version')}"
        raise bad_input(str(path), f"format version {FORMAT_VERSION}", got, "Use the package version that wrote it.")
    return document


def write_index(folder: Path) -> None:
    """index.csv (and index.parquet, with pyarrow) of all shards that are there, in their order."""
    with locked(folder / ".index.lock", wait=True):
        with atomic_writer(folder / INDEX) as file:
            text = io.TextIOWrapper(file, newline="", write_through=True)
            writer = csv.writer(text)
            writer.writerow(COLUMNS)
            for line in _index_lines(folder):
                writer.writerow(line)
            text.detach()
        _write_parquet(folder)


def _index_lines(folder: Path) -> Iterator[tuple[Any, ...]]:
    for path in shard_paths(folder):
        for place, row in enumerate(read_rows(path)):
            s = row.signal
            size = "x".join(map(str, s.shape))
            known = (f"{s.psnr:.4f}", s.steps, f"{s.seconds:.6f}", s.stop_reason, s.fingerprint)
            yield (row.index, row.source, size, s.channels, *known, path.stem, place)


def _write_parquet(folder: Path) -> None:
    try:
        import pyarrow  # type: ignore[import-not-found,import-untyped,unused-ignore]
        import pyarrow.csv  # type: ignore[import-not-found,import-untyped,unused-ignore]
        import pyarrow.parquet  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return
    # Names and hashes of digits are text all the same.
    texts = dict.fromkeys(("source", "size", "fingerprint", "shard", "stop_reason"), pyarrow.string())
    options = pyarrow.csv.ConvertOptions(column_types=texts)
    with (
        pyarrow.csv.open_csv(folder / INDEX, convert_options=options) as reader,
        atomic_writer(folder / "index.parquet") as file,
        pyarrow.parquet.ParquetWriter(file, reader.schema) as writer,
    ):
        for batch in reader:
            writer.write_batch(batch)


@contextmanager
def locked(path: Path, wait: bool = False) -> Iterator[IO[bytes]]:
    """Hold a lock that ends with the process, however it ends.

    Raises InputError where another process holds it, unless told to wait.
    """
    file = path.open("ab")
    try:
        try:
            _lock(file, wait)
        except OSError:
            raise bad_input(
                str(path.parent), "no other run on this part of the folder", "one that is running", "Wait for it."
            ) from None
        yield file
    finally:
        file.close()


try:
    import fcntl

    def _lock(file: IO[bytes], wait: bool) -> None:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))

except ImportError:  # Windows
    import msvcrt

    def _lock(file: IO[bytes], wait: bool) -> None:
        mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK  # type: ignore[attr-defined,unused-ignore]
        msvcrt.locking(file.fileno(), mode, 1)  # type: ignore[attr-defined,unused-ignore]


def flat(weights: dict[str, Tensor]) -> Tensor:  # [n, D]
    """Stacked networks as one vector each, in the order of Siren.parameters()."""
    return torch.cat([w.flatten(1) for w in weights.values()], 1)

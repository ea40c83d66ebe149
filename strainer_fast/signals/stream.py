"""Data sets as streams: signals read one at a time, so that memory does not grow with their number."""

from __future__ import annotations

import csv
import gzip
import hashlib
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from strainer_fast._checks import InputError, bad_input, bad_type
from strainer_fast.signals.load import Reading, Skipped, Source, reason_of
from strainer_fast.signals.signal import Signal

IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""The third byte of an IDX file, as numpy writes it (LeCun's MNIST page)."""

Wanted: TypeAlias = "Callable[[int], bool]"
Item: TypeAlias = "tuple[int, str, Any]"
"""(index, name of the source, what Reading.signal takes)"""


@dataclass(frozen=True)
class Stream:
    """A data set that is read signal by signal, in an order that is always the same.

    Args:
        description: what tells two data sets apart without reading them, as plain JSON data.
        number: of signals, files that turn out to be unreadable included; None where only the end will tell.
        reading: how images become signals.
    """

    description: dict[str, Any]
    number: int | None
    reading: Reading
    _items: Callable[[Wanted], Iterator[Item]]
    _again: Callable[[], Stream] | None = None

    def __reduce__(self) -> tuple[Callable[[], Stream], tuple[()]]:
        """Another process opens the source for itself."""
        if self._again is None:
            raise TypeError("an iterator can be read only once")
        return self._again, ()

    def read(self, wanted: Wanted = lambda index: True) -> Iterator[tuple[int, str, Signal | Skipped]]:
        """(index, source, signal) of each index that is wanted; a Skipped in place of an unreadable file."""
        for index, source, item in self._items(wanted):
            try:
                yield index, source, self.reading.signal(item, source)
            except (OSError, InputError) as error:
                if not isinstance(item, str | Path):
                    raise
                yield index, source, Skipped(str(item), reason_of(error))


def stream(
    source: Source | Iterable[Source],
    *,
    key: str | None = None,
    image_shape: tuple[int, ...] | None = None,
    label_column: int | None = None,
    **reading: Any,
) -> Stream:
    """Open a data set for reading signal by signal.

    Args:
        source: a folder (its files in order of name); .npy, or .npz with one array of images or `key`, of [N, H, W] or
            [N, H, W, C]; an IDX file (MNIST's layout), plain or .gz; a .csv (or .csv.gz) with an image per line; an
            array or tensor as in .npy; or an iterable of anything that `load` reads, one signal each.
        key: which array of an .npz.
        image_shape: (H, W) or (H, W, C) of the images of a .csv; a square grey one by default.
        label_column: a column of a .csv that is no pixel (-1 is the last one).
        reading: size, crop, channels, alpha, value_range: as of `load`. A .csv without value_range holds 0 to 255.

    Raises InputError for a source that cannot be opened; what is wrong with a single array or line, when it is reached.
    """
    if isinstance(source, Tensor):
        source = source.detach().cpu().numpy()
    options = {"key": key, "image_shape": image_shape, "label_column": label_column, **reading}
    found = _opened_stream(source, Reading(**reading), key, image_shape, label_column)
    if isinstance(source, Iterator):
        return found
    where = Path(source).expanduser().absolute() if isinstance(source, str | Path) else source
    return replace(found, _again=partial(stream, where, **options))


def _opened_stream(
    source: Any, how: Reading, key: str | None, image_shape: tuple[int, ...] | None, label_column: int | None
) -> Stream:
    if isinstance(source, np.ndarray):
        return _of_array(source, how, {"kind": "array"})
    if isinstance(source, str | Path):
        return _of_path(Path(source).expanduser(), how, key, image_shape, label_column)
    if isinstance(source, Iterable):
        return _of_iterable(source, how)
    raise bad_type("signals", "a path, an array or an iterable of signals", source, "See signals.stream.")


def _stream(how: Reading, description: dict[str, Any], number: int | None, items: Any) -> Stream:
    return Stream(description | {"number": number, "reading": _plain(asdict(how))}, number, how, items)


def _plain(options: dict[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in options.items()}


def _of_path(
    path: Path, how: Reading, key: str | None, image_shape: tuple[int, ...] | None, label_column: int | None
) -> Stream:
    if path.is_dir():
        return _of_folder(path, how)
    if not path.exists():
        raise bad_input(str(path), "a folder or a file with signals", "nothing there", "Check the path.")
    kind = path.name.lower().removesuffix(".gz")
    try:
        if kind.endswith(".npy"):
            return _of_array(np.load(path, mmap_mode="r", allow_pickle=False), how, {"kind": "npy", "path": str(path)})
        if kind.endswith(".npz"):
            return _of_npz(path, how, key)
        if kind.endswith((".csv", ".txt")):
            return _of_csv(path, how, image_shape, label_column)
        with _opened(path) as file:
            if _idx_header(file) is not None:
                return _of_idx(path, how)
    except (ValueError, EOFError, zipfile.BadZipFile, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise bad_input(str(path), "a data set", f"one that cannot be read ({error})", "It may be cut short.") from None
    return _of_iterable([path], how)


def _of_folder(path: Path, how: Reading) -> Stream:
    # Names only: a Path for each of a million files takes ten times the memory.
    names = sorted(e.name for e in os.scandir(path) if not e.name.startswith(".") and not e.is_dir())
    if not names:
        raise bad_input(str(path), "a folder with images", "no files in it", "Subfolders are not searched.")
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()[:16]

    def items(wanted: Wanted) -> Iterator[Item]:
        return ((i, name, path / name) for i, name in enumerate(names) if wanted(i))

    return _stream(how, {"kind": "folder", "path": str(path), "names": digest}, len(names), items)


def _of_iterable(source: Iterable[Any], how: Reading) -> Stream:
    spent = False

    def items(wanted: Wanted) -> Iterator[Item]:
        nonlocal spent
        iterator = iter(source)
        if spent and iterator is source:
            raise bad_input("signals", "an iterator that starts again", "one that is spent", "Pass a new one.")
        spent = True
        for i, item in enumerate(iterator):
            if wanted(i):
                name = (
                    item.name if isinstance(item, Signal) else Path(item).name if isinstance(item, str | Path) else ""
                )
                yield i, name or f"signal-{i:07d}", item

    number = len(source) if isinstance(source, Sized) else None
    return _stream(how, {"kind": "iterable"}, number, items)


def _check_stack(shape: tuple[int, ...], what: str) -> None:
    if len(shape) not in (3, 4) or 0 in shape:
        raise bad_input(what, "images [N, H, W] or [N, H, W, C]", list(shape), "One array holds all images.")


def _of_array(array: NDArray[Any], how: Reading, description: dict[str, Any]) -> Stream:
    _check_stack(array.shape, description.get("path", "signals"))
    description = description | {"shape": list(array.shape), "dtype": str(array.dtype)}

    def items(wanted: Wanted) -> Iterator[Item]:
        return ((i, f"signal-{i:07d}", np.asarray(array[i])) for i in range(len(array)) if wanted(i))

    return _stream(how, description, len(array), items)


def _records(
    open_at_first: Callable[[], IO[bytes]], shape: tuple[int, ...], dtype: np.dtype[Any], what: str
) -> Callable[[Wanted], Iterator[Item]]:
    """Items of `shape` [N, ...] that lie one after the other in a file."""
    size = math.prod(shape[1:]) * dtype.itemsize

    def items(wanted: Wanted) -> Iterator[Item]:
        with open_at_first() as file:
            for i in range(shape[0]):
                data = file.read(size)
                if len(data) < size:
                    raise bad_input(what, f"{shape[0]} images", f"{i}, then the end", "The file is cut short.")
                if wanted(i):
                    image = np.frombuffer(data, dtype).reshape(shape[1:])
                    yield i, f"signal-{i:07d}", image.astype(dtype.newbyteorder("="))

    return items


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")  # type: ignore[return-value]


def _idx_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]] | None:
    """(shape, dtype) of an IDX file; None for another one."""
    magic = file.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0" or magic[2] not in IDX_TYPES or not 1 <= magic[3] <= 8:
        return None
    axes = file.read(4 * magic[3])
    if len(axes) < 4 * magic[3]:
        return None
    return struct.unpack(f">{magic[3]}I", axes), np.dtype(IDX_TYPES[magic[2]])


def _of_idx(path: Path, how: Reading) -> Stream:
    def at_first() -> IO[bytes]:
        file = _opened(path)
        _idx_header(file)
        return file

    with _opened(path) as file:
        header = _idx_header(file)
    assert header is not None
    shape, dtype = header
    _check_stack(shape, str(path))
    description = {"kind": "idx", "path": str(path), "shape": list(shape), "dtype": dtype.name}
    return _stream(how, description, shape[0], _records(at_first, shape, dtype, str(path)))


def _of_npz(path: Path, how: Reading, key: str | None) -> Stream:
    with zipfile.ZipFile(path) as archive:
        shapes = {name.removesuffix(".npy"): _npy_header(archive.open(name))[0] for name in archive.namelist()}
    stacks = [name for name, shape in shapes.items() if len(shape) in (3, 4)]
    chosen = key or (stacks[0] if len(stacks) == 1 else None)
    if chosen not in shapes:
        listing = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise bad_input(str(path), "the key of an array of images", key or listing, f"Pass key=, one of: {listing}.")
    _check_stack(shapes[chosen], f"{path}: {chosen}")

    def at_first() -> IO[bytes]:
        # From the archive as it is: np.load would unpack the whole array.
        file = zipfile.ZipFile(path).open(f"{chosen}.npy")  # noqa: SIM115
        _npy_header(file)
        return file

    with at_first(), zipfile.ZipFile(path).open(f"{chosen}.npy") as file:
        shape, dtype = _npy_header(file)
    description = {"kind": "npz", "path": str(path), "key": chosen, "shape": list(shape), "dtype": dtype.name}
    return _stream(how, description, shape[0], _records(at_first, shape, dtype, f"{path}: {chosen}"))


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """(shape, dtype) of an array in a file that stands at its beginning, read up to its first number."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError("an array of Python objects, or in Fortran order")
    return shape, dtype


def _of_csv(path: Path, how: Reading, image_shape: tuple[int, ...] | None, label_column: int | None) -> Stream:
    with _text(path) as file:
        rows = csv.reader(file)
        first = next(rows, [])
        header = bool(first) and not _is_number(first[0])
        columns = len(next(rows, []) if header else first) - (label_column is not None)
    side = math.isqrt(columns)
    shape = image_shape or ((side, side) if side * side == columns and columns else None)
    if shape is None or len(shape) not in (2, 3) or math.prod(shape) != columns:
        wanted = "x".join(map(str, image_shape)) if image_shape else "a square number"
        fix = "Pass image_shape=(H, W) or (H, W, C), and label_column= where a column is no pixel."
        raise bad_input(str(path), f"{wanted} of pixels a line", f"{columns} columns", fix)
    if how.value_range is None:
        how = Reading(**asdict(how) | {"value_range": (0.0, 255.0)})

    def items(wanted: Wanted) -> Iterator[Item]:
        with _text(path) as file:
            rows = csv.reader(file)
            if header:
                next(rows)
            for i, row in enumerate(rows):
                if not wanted(i):
                    continue
                if label_column is not None and row:
                    del row[label_column]
                if len(row) != columns:
                    raise bad_input(f"{path}, image {i}", f"{columns} pixels", len(row), "The file is damaged.")
                try:
                    pixels = np.array(row, dtype=np.float64)
                except ValueError as error:
                    raise bad_input(f"{path}, image {i}", "numbers", error, "The file is damaged.") from None
                yield i, f"signal-{i:07d}", pixels.reshape(shape)

    description = {"kind": "csv", "path": str(path), "shape": [None, *shape], "label_column": label_column}
    return _stream(how, description, None, items)


def _text(path: Path) -> IO[str]:
    return gzip.open(path, "rt", newline="") if path.suffix.lower() == ".gz" else path.open(newline="")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True

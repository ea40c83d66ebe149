"""Files that are whole or not there: safetensors with JSON metadata, written atomically, read with distrust."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from strainer_fast._checks import InputError, bad_input
from strainer_fast._version import __version__

FORMAT_VERSION = 1
_KEY = "strainer_fast"
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}

Shapes = dict[str, tuple[int, ...]]


@contextmanager
def atomic_writer(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that replaces `path` only when all was written and has reached the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w+b") as file:  # some formats are read while they are written
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        with suppress(OSError):  # not every system lets a folder be opened
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path, needed_bytes: int = 0) -> None:
    """Make the folder and prove that a file can be written there, before any work starts.

    Raises InputError when it cannot be, or when the disk has less than `needed_bytes` free.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"strainer_fast")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise bad_input(
            "output", "a folder that can be written", f"{folder} ({error})", "Choose another one."
        ) from error
    if free < needed_bytes:
        raise bad_input(
            "output", f"{needed_bytes:,} bytes free", f"{free:,} in {folder}", "Free some space or choose another disk."
        )


def write_tensors(path: Path, kind: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write tensors and metadata as one safetensors file of ours.

    Args:
        kind: what the file is ("encoder", "fit", ...), checked when it is read.
        metadata: JSON data; format and package version are added.
    """
    document = {"kind": kind, "format_version": FORMAT_VERSION, "package_version": __version__, **metadata}
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    data = save(plain, {_KEY: json.dumps(document, allow_nan=False)})
    with atomic_writer(path) as file:
        file.write(data)


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of one of our files.

    Raises InputError for a file that is missing, cut short, not ours, or of another format version.
    """
    if not path.is_file():
        raise bad_input("file", "a .safetensors file of strainer_fast", f"{path}, which is no file", "Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
    except (SafetensorError, OSError) as error:
        raise bad_input(
            str(path),
            "a complete safetensors file",
            f"one that cannot be read ({error})",
            "It may be cut short.",
        ) from None
    document = None
    if text is not None:
        with suppress(json.JSONDecodeError, RecursionError):
            document = json.loads(text)
    if not isinstance(document, dict) or "kind" not in document:
        raise bad_input(str(path), "a file written by strainer_fast", "another safetensors file", "See load_foreign.")
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        written = document.get("package_version", "an unknown version")
        raise bad_input(
            str(path),
            f"format version {FORMAT_VERSION}",
            f"version {version} (written by strainer_fast {written})",
            "Use the package version that wrote it, or write it again.",
        )
    return document


def read_tensors(
    path: Path, kind: str, expected: Callable[[dict[str, Any]], Shapes]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read one of our files.

    Args:
        kind: what the file has to be.
        expected: from the metadata, the shape of every tensor in the file. Compared with the file's header before
            anything is allocated.

    Raises InputError as `read_metadata`, and for a file of another kind, other shapes, or non-finite weights.
    """
    document = read_metadata(path)
    if document["kind"] != kind:
        raise bad_input(
            str(path), f"{_article(kind)} file", f"{_article(str(document['kind']))} file", "Pass another file."
        )
    try:
        shapes = expected(document)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise bad_input(
            str(path), "complete metadata", f"{type(error).__name__}: {error}", "The file is damaged."
        ) from None
    with safe_open(path, framework="pt") as file:
        have = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        types = {file.get_slice(name).get_dtype() for name in have}
        if have != shapes or not types <= set(_DTYPES.values()):
            wrong = sorted(name for name in have.keys() | shapes.keys() if have.get(name) != shapes.get(name))
            raise bad_input(
                str(path),
                "tensors as its metadata describe them",
                f"others at {', '.join(wrong[:5])}",
                "The file is damaged.",
            )
        tensors = {name: file.get_tensor(name) for name in have}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not name.startswith("curves.") and not torch.isfinite(tensor).all():
            raise bad_input(str(path), "finite weights", f"NaN or infinity in {name}", "The file is damaged.")
    return tensors, document


def _article(word: str) -> str:
    return f"{'an' if word[:1] in 'aeiou' else 'a'} {word}"

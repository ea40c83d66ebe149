"""What keeps fitted networks: nothing finished is lost, shards are whole or not there, runs do not mix."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strainer_fast._checks import InputError, bad_input
from strainer_fast._files import check_writable
from strainer_fast.datasets import folder as files
from strainer_fast.datasets.folder import PART, SHARD, SHARDS, SKIPPED, Row
from strainer_fast.datasets.journal import Journal
from strainer_fast.fitting import engine
from strainer_fast.models import Architecture
from strainer_fast.signals import Skipped

SHARD_BYTES = 2**26
SHARD_ROWS = 4096
"""A shard is full at either: it is held in memory until then."""


class Finished:
    """Which signals are fitted, with their fingerprints: nine bytes for each, whatever their number."""

    def __init__(self) -> None:
        self._known = np.zeros(0, dtype=bool)
        self._prints = np.zeros(0, dtype=np.uint64)

    def add(self, row: Row) -> None:
        """Note a signal."""
        if row.index >= len(self._known):
            more = max(1024, row.index + 1, 2 * len(self._known)) - len(self._known)
            self._known = np.concatenate([self._known, np.zeros(more, dtype=bool)])
            self._prints = np.concatenate([self._prints, np.zeros(more, dtype=np.uint64)])
        self._known[row.index] = True
        self._prints[row.index] = int(row.signal.fingerprint, 16)

    def fingerprint(self, index: int) -> str | None:
        """Of a signal that is fitted; None of another one."""
        if index >= len(self._known) or not self._known[index]:
            return None
        return f"{int(self._prints[index]):016x}"


class Writer:
    """Keeps networks of one part of a data set; see `open_writer`.

    Attributes:
        finished: signals of the whole folder that are fitted, this part's among them.
    """

    def __init__(self, folder: Path, architecture: Architecture, prefix: str, shard_rows: int | None) -> None:
        self.folder, self.architecture, self.prefix = folder, architecture, prefix
        self._asked_rows = shard_rows
        self._open: dict[tuple[int, int], Journal] = {}  # by coordinates and channels
        self.finished = Finished()
        (folder / f"{prefix}{SKIPPED}").unlink(missing_ok=True)  # all files are read again
        for path in files.shard_paths(folder):
            path.with_suffix(PART).unlink(missing_ok=True)  # killed between the two
            for row in files.read_rows(path):
                self.finished.add(row)
        self.next = 0
        for path in sorted((folder / SHARDS).glob(f"{prefix}*")):
            self.next = max(self.next, _number(path) + 1)
        for path in sorted((folder / SHARDS).glob(f"*{PART}")):
            if path.stem.rpartition("-")[0] == prefix.removesuffix("-"):
                self._take_over(path)

    def _take_over(self, path: Path) -> None:
        """Go on with a journal that a run has left."""
        journal = Journal(path)
        if not journal.rows:
            journal.close(delete=True)
            return
        for row in journal.rows:
            self.finished.add(row)
        kind = _kind(journal.rows[0])
        if kind in self._open:
            self._seal(kind)
        self._open[kind] = journal

    def append(self, rows: list[Row], weights: dict[str, Tensor]) -> None:
        """Keep networks of one shape, stacked [n, ...]; they are safe when this returns.

        Raises OSError where the disk takes no more.
        """
        kind = _kind(rows[0])
        while rows:
            if kind not in self._open:
                self._open[kind] = Journal(self.folder / SHARDS / f"{self.prefix}{self.next:05d}{PART}")
                self.next += 1
            room = max(1, self.shard_rows(kind) - len(self._open[kind].rows))
            self._open[kind].append(rows[:room], {name: w[:room] for name, w in weights.items()})
            for row in rows[:room]:
                self.finished.add(row)
            if len(self._open[kind].rows) >= self.shard_rows(kind):
                self._seal(kind)
            rows, weights = rows[room:], {name: w[room:] for name, w in weights.items()}

    def shard_rows(self, kind: tuple[int, int]) -> int:
        """Networks of a full shard."""
        shapes = files.parameter_shapes(self.architecture, *kind).values()
        size = 4 * sum(math.prod(shape) for shape in shapes)
        return self._asked_rows or max(1, min(SHARD_ROWS, SHARD_BYTES // size))

    def _seal(self, kind: tuple[int, int]) -> None:
        """Make a shard of a journal."""
        journal = self._open.pop(kind)
        order = sorted(range(len(journal.rows)), key=lambda i: journal.rows[i].index)
        vectors = torch.cat(journal.vectors)[order]
        weights, at = {}, 0
        for name, shape in files.parameter_shapes(self.architecture, *kind).items():
            weights[name] = vectors[:, at : at + math.prod(shape)].reshape(-1, *shape)
            at += math.prod(shape)
        rows = [journal.rows[i] for i in order]
        files.write_shard(journal.path.with_suffix(SHARD), self.architecture, rows, weights)
        journal.close(delete=True)

    def skip(self, index: int, skipped: Skipped) -> None:
        """Note a file that could not be read."""
        path = self.folder / f"{self.prefix}{SKIPPED}"
        new = not path.exists()
        with path.open("a", newline="", errors="surrogateescape") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(("index", "source", "reason"))
            writer.writerow((index, skipped.source, skipped.reason))

    def close(self, seal: bool) -> None:
        """Make shards of what is there, and the index; or, after a failure, just let go of it."""
        for kind in list(self._open):
            if seal:
                self._seal(kind)
            else:
                self._open.pop(kind).close(delete=False)
        if seal:
            files.write_index(self.folder)


@contextmanager
def open_writer(
    folder: Path,
    settings: dict[str, Any],
    architecture: Architecture,
    part: tuple[int, int],
    *,
    resume: bool,
    overwrite: bool,
    shard_rows: int | None,
    needed_bytes: int,
) -> Iterator[Writer]:
    """Open the folder for one run on part i of n: begin it, or go on with what is there.

    Raises InputError for a folder that holds a data set already (unless resuming), one of other settings or another
    source, one that another run works on, or too little space.
    """
    index, parts = part
    if folder.exists() and not folder.is_dir():
        raise bad_input("out", "a folder", f"the file {folder}", "Choose another name.")
    check_writable(folder)
    (folder / SHARDS).mkdir(exist_ok=True)
    with ExitStack() as stack:
        with files.locked(folder / ".manifest.lock", wait=True):
            if overwrite:
                _clear(folder)
            if (folder / files.MANIFEST).exists():
                before = files.read_manifest(folder)
                _check_same(folder, before, settings, resume, parts)
                if before["parts"] != parts:
                    _alone(folder, before["parts"])
                    _seal_all(folder, architecture, before["parts"])
                    files.write_manifest(folder, {**settings, "parts": parts})
            else:
                check_writable(folder, needed_bytes)
                files.write_manifest(folder, {**settings, "parts": parts})
            stack.enter_context(files.locked(folder / f".lock-{index}of{parts}"))
        writer = Writer(folder, architecture, _prefix(index, parts), shard_rows)
        finished = False
        try:
            yield writer
            finished = True
        finally:
            writer.close(seal=finished)


def begin(folder: Path, resume: bool, overwrite: bool) -> None:
    """Make a folder ready for parts that all resume it: empty where it is to be overwritten.

    Raises InputError for a folder that holds a data set, unless resuming or overwriting.
    """
    if overwrite and folder.is_dir():
        with files.locked(folder / ".manifest.lock", wait=True):
            _clear(folder)
    if (folder / files.MANIFEST).exists() and not resume:
        raise _occupied(folder)


def _occupied(folder: Path) -> InputError:
    fix = "Resume it, overwrite it, or use another."
    return bad_input(str(folder), "a new or empty folder", "one that holds a data set", fix)


def _check_same(folder: Path, before: dict[str, Any], settings: dict[str, Any], resume: bool, parts: int) -> None:
    if not resume and not (parts > 1 and before["parts"] == parts):  # parts of one run begin one after the other
        raise _occupied(folder)
    fix = "Use another folder, or overwrite this one."
    wanted = {name: settings[name] for name in ("recipe", "init", "architecture", "source")}
    then = {name: before.get(name) for name in wanted}
    for each in (wanted, then):  # a source may be moved
        each["source"] = {k: v for k, v in (each["source"] or {}).items() if k != "path"}
    engine.check_same_settings(str(folder), then, wanted, fix)


def _alone(folder: Path, parts: int) -> None:
    """Refuse where another run works on any part."""
    for index in range(parts):
        with files.locked(folder / f".lock-{index}of{parts}"):
            pass


def _seal_all(folder: Path, architecture: Architecture, parts: int) -> None:
    """Make shards of all journals that a run in other parts has left."""
    for index in range(parts):
        Writer(folder, architecture, _prefix(index, parts), None).close(seal=True)


def _clear(folder: Path) -> None:
    """Delete the data set of a folder, if there is one that no run works on."""
    if not (folder / files.MANIFEST).exists():
        return
    _alone(folder, files.read_manifest(folder)["parts"])
    (folder / files.MANIFEST).unlink()
    shutil.rmtree(folder / SHARDS)
    (folder / SHARDS).mkdir()
    for path in (*folder.glob(f"*{SKIPPED}"), folder / files.INDEX, folder / "index.parquet"):
        path.unlink(missing_ok=True)


def _prefix(index: int, parts: int) -> str:
    return "" if parts == 1 else f"{index}of{parts}-"


def _kind(row: Row) -> tuple[int, int]:
    return len(row.signal.shape), row.signal.channels


def _number(path: Path) -> int:
    text = path.name.split(".")[0].rpartition("-")[2]
    return int(text) if text.isdigit() else -1

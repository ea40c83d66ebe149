"""Networks of a shard that is not full yet: appended one by one, so that a killed process loses none of them.

A record is a header (magic, checksum, lengths), what is known of the fit as JSON, and the network's parameters as
float32. A record that was cut short is the last one, and is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from strainer_fast.datasets.folder import Row, flat

HEADER = struct.Struct("<4sIIQ")
MAGIC = b"SFN1"
SYNC_SECONDS = 1.0
"""A killed process loses nothing; a machine that loses its power, what was finished in this time."""


class Journal:
    """Rows and networks of one shape, in a file and in memory.

    Args:
        path: of the file; what it holds already is read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.vectors: list[Tensor] = []  # [n, D] each
        end = 0
        if path.exists():
            for row, vector, behind in records(path.read_bytes()):
                self.rows.append(row)
                self.vectors.append(vector)
                end = behind
        self._file = path.open("r+b" if path.exists() else "wb", buffering=0)
        self._file.truncate(end)
        self._file.seek(end)
        self._synced = time.monotonic()

    def append(self, rows: list[Row], weights: dict[str, Tensor]) -> None:
        """Keep networks, stacked [n, ...]; they are safe from a killed process when this returns.

        Raises OSError where the disk takes no more: what was kept before stays.
        """
        vectors = flat(weights).contiguous()
        data = b"".join(_encoded(row, vector) for row, vector in zip(rows, vectors, strict=True))
        done = 0
        while done < len(data):  # an unbuffered write may take a part only
            done += self._file.write(data[done:]) or 0
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()
        self.rows += rows
        self.vectors.append(vectors)

    def close(self, delete: bool) -> None:
        """Let go of the file; delete it once a shard holds all that is in it."""
        if not delete:
            os.fsync(self._file.fileno())
        self._file.close()
        if delete:
            self.path.unlink(missing_ok=True)  # another part of the data set may have tidied up


def _encoded(row: Row, vector: Tensor) -> bytes:
    text, numbers = json.dumps(row.as_dict(), allow_nan=False).encode(), vector.numpy().tobytes()
    return HEADER.pack(MAGIC, zlib.crc32(numbers, zlib.crc32(text)), len(text), len(numbers)) + text + numbers


def records(data: bytes) -> Iterator[tuple[Row, Tensor, int]]:
    """(row, network [1, D], where its record ends) of every whole record from the beginning on."""
    at = 0
    while at + HEADER.size <= len(data):
        magic, checksum, text_size, numbers_size = HEADER.unpack_from(data, at)
        middle = at + HEADER.size + text_size
        end = middle + numbers_size
        text, numbers = data[at + HEADER.size : middle], data[middle:end]
        if magic != MAGIC or end > len(data) or zlib.crc32(numbers, zlib.crc32(text)) != checksum:
            return
        at = end
        yield Row.from_dict(json.loads(text)), torch.frombuffer(bytearray(numbers), dtype=torch.float32)[None], end

"""PNG, written a strip of rows at a time: Pillow wants the whole image in memory, and has no 16-bit colour."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable
from typing import IO

import numpy as np
from numpy.typing import NDArray

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}
"""Channels -> colour type (PNG specification, section 11.2.1)."""
UP = 2
"""Filter of every row: the difference from the row above (section 9.2)."""


def write_png(
    file: IO[bytes],
    strips: Iterable[NDArray[np.unsignedinteger]],  # [rows, width, channels] each, from the top
    height: int,
    width: int,
    channels: int,
    bits: int,
) -> None:
    """Write an image of 8 or 16 bits a channel and 1 to 4 channels; strips have to be `height` rows together."""
    file.write(b"\x89PNG\r\n\x1a\n")
    _chunk(file, b"IHDR", struct.pack(">IIBBBBB", width, height, bits, COLOUR_TYPES[channels], 0, 0, 0))
    packer = zlib.compressobj()
    above = np.zeros(width * channels * bits // 8, np.uint8)
    for strip in strips:
        rows = strip.astype(">u2" if bits == 16 else np.uint8).view(np.uint8).reshape(len(strip), -1)
        differences = np.diff(rows, axis=0, prepend=above[None])
        above = rows[-1]
        filtered = np.insert(differences, 0, UP, axis=1)
        _chunk(file, b"IDAT", packer.compress(filtered.tobytes()))
    _chunk(file, b"IDAT", packer.flush())
    _chunk(file, b"IEND", b"")


def _chunk(file: IO[bytes], kind: bytes, data: bytes) -> None:
    if data or kind == b"IEND":
        file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))

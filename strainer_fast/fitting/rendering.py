"""Networks evaluated on regular grids of any resolution, in memory or into a file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from strainer_fast._checks import bad_input, check_count
from strainer_fast._files import atomic_writer, check_writable
from strainer_fast._png import COLOUR_TYPES, write_png
from strainer_fast.fitting.engine import CHUNK
from strainer_fast.models import Siren
from strainer_fast.ops.dispatch import choose, resolve_precision
from strainer_fast.signals.grid import axis, mesh

GPU_CHUNK = 2**20
"""Points evaluated at once on a GPU, which engine.CHUNK would leave idle."""

MAX_SIDE = 2**20
"""Samples per axis; the coordinates of a whole axis are in memory."""


def render(
    network: Siren,
    size: int | Sequence[int],
    window: Sequence[tuple[float, float]] | None = None,
    *,
    precision: str = "auto",
) -> Tensor:  # [*size, C]
    """Evaluate a network on a regular grid, a strip of rows at a time.

    Args:
        network: on any device; the result is on the CPU.
        size: samples per axis, (height, width) for images; an int for the same on every axis.
        window: (low, high) per axis in [-1, 1], y first: the part of the square to show; None is all of it.
        precision: what operands of products are rounded to, sums being float32: "fp32", or on a GPU "tf32x3", "tf32",
            "fp16", "bf16". "auto" is tf32x3 with the Triton kernels on an A100, H100 or B200, within 1e-5 of fp32, and
            fp32 elsewhere.
            In "fp16" a network of up to 256 units runs whole on chip; it is right to about a thousandth.

    Returns:
        Values, not clamped.

    Raises InputError for a size, window or precision that cannot be, before any work.
    """
    shape, strips = _strips(network, size, window, precision)
    out = torch.empty(*shape, network.head.out_features, dtype=network.head.weight.dtype)
    start = 0
    for strip in strips:
        out[start : start + len(strip)] = strip
        start += len(strip)
    return out


def render_to(
    network: Siren,
    path: str | Path,
    size: int | Sequence[int],
    window: Sequence[tuple[float, float]] | None = None,
    *,
    bits: int = 8,
    precision: str = "auto",
) -> Path:
    """Evaluate a network on a regular grid into a file, whole or not at all; memory does not grow with the grid.

    Args:
        path: its suffix says what is written. .png: values clamped to [0, 1] and rounded to `bits`, for images of 1 to
            4 channels. .npy: an array [*size, C] of float32 as it is.
        network, size, window, precision: as in `render`.
        bits: 8 or 16 a channel, of a PNG.

    Returns:
        The path.

    Raises InputError for another suffix and for what a PNG cannot hold, before any work.
    """
    path = Path(path)
    shape, strips = _strips(network, size, window, precision)
    channels = network.head.out_features
    if path.suffix not in WRITERS:
        raise bad_input("path", "a name that ends in .png or .npy", path.name, "The suffix says what is written.")
    if path.suffix == ".png":
        if len(shape) != 2 or channels not in COLOUR_TYPES:
            got = f"{len(shape)} axes, {channels} channels"
            raise bad_input("PNG", "an image with 2 axes and 1 to 4 channels", got, "Write .npy instead.")
        if bits not in (8, 16):
            raise bad_input("bits", "8 or 16", bits, "A PNG has no others.")
    check_writable(path.parent, 4 * math.prod(shape) * channels if path.suffix == ".npy" else 0)
    with atomic_writer(path) as file:
        WRITERS[path.suffix](file, strips, shape, channels, bits)
    return path


def quantised(values: Tensor, bits: int) -> NDArray[np.unsignedinteger]:  # [...] in [0, 1]
    """Clamped and rounded to whole numbers of so many bits."""
    rounded: NDArray[np.float32] = (values.clamp(0, 1) * (2**bits - 1)).round().numpy()
    return rounded.astype(np.uint8 if bits == 8 else np.uint16)


def _write_png(file: IO[bytes], strips: Iterator[Tensor], shape: Sequence[int], channels: int, bits: int) -> None:
    height, width = shape
    write_png(file, (quantised(strip, bits) for strip in strips), height, width, channels, bits)


def _write_npy(file: IO[bytes], strips: Iterator[Tensor], shape: Sequence[int], channels: int, bits: int) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (*shape, channels)}
    np.lib.format.write_array_header_2_0(file, header)
    for strip in strips:
        file.write(strip.numpy().astype("<f4").tobytes())


WRITERS: dict[str, Callable[[IO[bytes], Iterator[Tensor], Sequence[int], int, int], None]] = {
    ".png": _write_png,
    ".npy": _write_npy,
}


def _strips(
    network: Siren, size: int | Sequence[int], window: Sequence[tuple[float, float]] | None, precision: str
) -> tuple[list[int], Iterator[Tensor]]:
    """Samples per axis, checked, and the values of some rows at a time, [rows, *rest, C] on the CPU."""
    weight = next(network.parameters())
    implementation = choose("auto", weight.device, weight.dtype).name
    precision = resolve_precision(precision, implementation, weight.device, exact=True)
    dims = weight.shape[1]
    shape = [size] * dims if isinstance(size, int) else list(size)
    if len(shape) != dims or (window is not None and len(window) != dims):
        raise bad_input("size", f"one number per axis, {dims} in all", size, "Give samples per axis, y first.")
    for n in shape:
        check_count("size", n, 1, MAX_SIDE)
    for low, high in window or ():
        if not -1 <= low < high <= 1:
            raise bad_input("window", "-1 <= low < high <= 1 on every axis", (low, high), "The square is [-1, 1].")
    bounds = [(-1.0, 1.0)] * dims if window is None else window
    axes = [axis(n, b, device=weight.device, dtype=weight.dtype) for n, b in zip(shape, bounds, strict=True)]
    chunk = CHUNK if weight.device.type == "cpu" else GPU_CHUNK
    rows = max(1, chunk // math.prod(shape[1:]))

    def evaluate() -> Iterator[Tensor]:
        for start in range(0, shape[0], rows):
            first = axes[0][start : start + rows]
            with torch.no_grad():
                values = network.values(mesh([first, *axes[1:]]), precision=precision)
            yield values.reshape(len(first), *shape[1:], -1).cpu()

    return shape, evaluate()

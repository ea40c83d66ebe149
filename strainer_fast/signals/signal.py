"""A signal: samples on a regular grid, with what is needed to undo how they were scaled."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from strainer_fast._checks import bad_input, bad_type
from strainer_fast.signals.grid import grid

MAX_NAME_BYTES = 120
"""File systems allow 255; output names add sizes and endings."""


@dataclass(frozen=True, eq=False)
class Signal:
    """Samples of one signal on a regular grid.

    Args:
        values: float tensor [*grid, C] in [0, 1]; an image is [H, W, C]. Kept as contiguous float32.
        name: label in results and file names.
        value_range: the source values that became 0 and 1, for example (0, 255).

    Raises InputError for empty, non-finite or out-of-range values.
    """

    values: Tensor  # [*grid, C]
    name: str = "signal"
    value_range: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        values = self.values
        what = f"values of {self.name!r}"
        if not isinstance(values, Tensor):
            raise bad_type(what, "a tensor [*grid, C]", values, "Use signals.load for arrays and files.")
        if values.ndim < 2 or values.numel() == 0:
            raise bad_input(what, "shape [*grid, C] without empty axes", list(values.shape), "Check the source.")
        with torch.inference_mode(False):  # so that the copy can take part in autograd later
            values = values.detach().to("cpu", torch.float32, copy=True).contiguous()
        bad = ~torch.isfinite(values)
        if bad.any():
            first = tuple(int(i) for i in bad.nonzero()[0])
            raise bad_input(
                what, "finite numbers", f"{int(bad.sum())} NaN or infinite, the first at {first}", "Repair them first."
            )
        low, high = float(values.min()), float(values.max())
        if low < 0.0 or high > 1.0:
            raise bad_input(
                what,
                "numbers in [0, 1]",
                f"[{low:g}, {high:g}]",
                "Scale them, or say what maps to 0 and 1: value_range=(low, high).",
            )
        object.__setattr__(self, "values", values)

    @property
    def shape(self) -> tuple[int, ...]:
        """Samples per axis, for an image (height, width)."""
        return tuple(self.values.shape[:-1])

    @property
    def channels(self) -> int:
        """Values per point."""
        return self.values.shape[-1]

    def points(self) -> Tensor:  # [P, D]
        """Coordinates of the samples in [-1, 1], y first."""
        return grid(self.shape)

    def samples(self) -> Tensor:  # [P, C]
        """The values, one row per point, in the order of `points()`."""
        return self.values.reshape(-1, self.channels)

    def fingerprint(self) -> str:
        """A hash of shape and values: tells whether two runs saw the same signal."""
        digest = hashlib.sha256(repr(tuple(self.values.shape)).encode())
        digest.update(self.values.numpy().tobytes())
        return digest.hexdigest()[:16]


def describe_sizes(signals: Sequence[Signal]) -> str:
    """Each distinct size once, with an example: '178x178x1 (a, b, ...), 64x64x3 (c)'."""
    groups: dict[str, list[str]] = {}
    for signal in signals:
        groups.setdefault("x".join(map(str, signal.values.shape)), []).append(signal.name)
    return ", ".join(
        f"{size} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for size, names in groups.items()
    )


def unique_names(names: Iterable[str]) -> list[str]:
    """Names that are safe as file names and differ from each other, letter case ignored.

    Path separators and other odd characters become '_'; a repeated name gets '-2', '-3', ...
    """
    taken: set[str] = set()
    result = []
    for name in names:
        safe = re.sub(r"[^\w. -]", "_", name).strip(" .-")
        safe = safe.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip() or "signal"
        candidate, count = safe, 1
        while candidate.lower() in taken:
            count += 1
            candidate = f"{safe}-{count}"
        taken.add(candidate.lower())
        result.append(candidate)
    return result

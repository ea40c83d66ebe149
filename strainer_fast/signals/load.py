"""From whatever the user has to a list of signals."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from strainer_fast._checks import InputError, bad_input, bad_type
from strainer_fast.signals import images
from strainer_fast.signals.signal import Signal, unique_names

Source: TypeAlias = "str | Path | np.ndarray[Any, Any] | Tensor | Image.Image | Signal"


@dataclass(frozen=True)
class Skipped:
    """A source that could not be read, and why."""

    source: str
    reason: str


def load(
    source: Source | Iterable[Source],
    *,
    size: int | tuple[int, int] | None = None,
    crop: bool = False,
    channels: int | None = None,
    alpha: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> list[Signal]:
    """Read signals from files, folders, arrays, tensors or Pillow images.

    Args:
        source: one of these or a sequence of them: an image file; a folder (its image files in order of name, no
            subfolders, no hidden files); an array or tensor [H, W], [H, W, C] or [N, H, W, C]; a Pillow image;
            a Signal.
            EXIF orientation is applied; 8-bit, 16-bit grey and float images keep their precision, 16-bit colour is read
            at 8 bits with a warning.
        size: resize to (height, width), or a square; None keeps each image's own size.
        crop: first cut the largest centred window of `size`'s aspect ratio (a square without `size`), so that nothing
            is stretched.
        channels: 1 or 3 converts to grey or RGB; None keeps what the image has.
        alpha: what to do with an alpha channel: "drop", "black" or "white" (composite over it), "keep". Images with
            alpha are refused without it.
        value_range: for arrays, and for images that are not 8-bit: the values that map to 0 and 1. Not needed for
            uint8, uint16, bool, or floats in [0, 1].

    Returns:
        At least one signal. Files in a folder or list that cannot be read are skipped with a UserWarning that names
        them; use `load_all` to get them as data.

    Raises:
        InputError when nothing could be read, or an array cannot be used.
    """
    signals, skipped = load_all(source, size=size, crop=crop, channels=channels, alpha=alpha, value_range=value_range)
    if skipped:
        listing = "; ".join(f"{s.source}: {s.reason}" for s in skipped)
        if not signals:
            raise InputError(listing)
        warnings.warn(f"skipped {len(skipped)} of {len(skipped) + len(signals)}: {listing}", stacklevel=2)
    return signals


def load_all(
    source: Source | Iterable[Source],
    *,
    size: int | tuple[int, int] | None = None,
    crop: bool = False,
    channels: int | None = None,
    alpha: str | None = None,
    value_range: tuple[float, float] | None = None,
) -> tuple[list[Signal], list[Skipped]]:
    """As `load`, but returns (signals, skipped files) and leaves it to the caller what to make of them.

    Raises InputError for a missing or empty folder, a missing file, or a bad array.
    """
    reading = Reading(size, crop, channels, alpha, value_range)
    signals: list[Signal] = []
    skipped: list[Skipped] = []
    for item in _items(source):
        try:
            signals.append(reading.signal(item, f"signal-{len(signals)}"))
        except (OSError, InputError) as error:
            if not isinstance(item, Path):
                raise
            skipped.append(Skipped(str(item), reason_of(error)))
    names = unique_names(signal.name for signal in signals)
    return [replace(signal, name=name) for signal, name in zip(signals, names, strict=True)], skipped


@dataclass(frozen=True)
class Reading:
    """How one image becomes a signal; arguments as of `load`.

    Raises InputError for a size or channels that no image can have.
    """

    size: int | tuple[int, int] | None = None
    crop: bool = False
    channels: int | None = None
    alpha: str | None = None
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", images.check_size(self.size))
        if self.channels is not None and self.channels not in images.CHANNEL_CHOICES:
            raise bad_input("channels", "1 (grey), 3 (RGB) or None", self.channels, "None keeps what the image has.")

    def signal(self, item: Source, name: str) -> Signal:
        """One signal; files and Signals keep the names they have.

        Raises OSError for a file that is no image, and InputError for one, or an array, that cannot be used.
        """
        if isinstance(item, str | Path):
            item = Path(item)
            return self._finish(*images.from_pillow(images.read_image(item), self.value_range), name=item.stem)
        if isinstance(item, Signal):
            if item.values.ndim != 3 or not (self.size or self.crop or self.channels):
                return item
            return self._finish(item.values.numpy(), item.value_range, False, item.name)
        if isinstance(item, Image.Image):
            return self._finish(*images.from_pillow(item, self.value_range), name=name)
        return self._finish(*images.from_array(item, self.value_range, name), name=name)

    def _finish(self, image: images.FloatImage, source_range: images.Range, has_alpha: bool, name: str) -> Signal:
        image = images.apply_alpha(image, has_alpha, self.alpha, name)
        image = images.convert_channels(image, self.channels, name)
        signal = Signal(torch.from_numpy(image), name, source_range)
        if not (self.size or self.crop):
            return signal
        # Checked before resizing too, which would smear a NaN and clip what is out of range.
        shape = images.check_size(self.size)
        return replace(signal, values=torch.from_numpy(images.resize(image, shape, self.crop)))


def reason_of(error: Exception) -> str:
    """Why a file was skipped, in a line."""
    return "not an image that Pillow can read" if "identify" in str(error) else str(error)


def as_signals(source: Source | Iterable[Source]) -> list[Signal]:
    """Signals as they are, anything else through `load`."""
    if isinstance(source, Sequence) and source and all(isinstance(s, Signal) for s in source):
        names = unique_names(s.name for s in source if isinstance(s, Signal))
        return [replace(s, name=n) for s, n in zip(source, names, strict=True) if isinstance(s, Signal)]
    return load(source)


def _items(source: Source | Iterable[Source]) -> list[Any]:
    """One entry per signal: paths of files, arrays without a stack axis, Pillow images or Signals."""
    if isinstance(source, str | Path):
        return _files(Path(source))
    if isinstance(source, np.ndarray | Tensor):
        return list(source) if source.ndim == 4 else [source]
    if isinstance(source, Image.Image | Signal):
        return [source]
    if isinstance(source, Iterable):
        found = [item for entry in source for item in _items(entry)]
        if not found:
            raise bad_input("signals", "at least one", "an empty sequence", "Pass images.")
        return found
    raise bad_type("signals", "a path, array, tensor, Pillow image or a sequence of them", source, "See signals.load.")


def _files(path: Path) -> list[Path]:
    path = path.expanduser()
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if not p.is_dir() and not p.name.startswith("."))
        if not files:
            raise bad_input(str(path), "a folder with images", "no files in it", "Subfolders are not searched.")
        return files
    if not path.exists():
        raise bad_input(str(path), "an image file or a folder", "nothing there", "Check the path.")
    return [path]

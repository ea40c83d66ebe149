"""Images of any common kind, brought to float32 [H, W, C] in [0, 1] without guessing."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from strainer_fast._checks import bad_input, bad_type, check_choice

ALPHA_CHOICES = ("drop", "black", "white", "keep")
CHANNEL_CHOICES = (1, 3)
MAX_SIDE, MAX_PIXELS = 16384, 2**26
# What Pillow reads by itself: other formats call programs (EPS) or are never images of a signal.
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")

FloatImage = NDArray[np.float32]
Range = tuple[float, float]


def read_image(path: Path) -> Image.Image:
    """Open and decode an image file, upright.

    Raises OSError (Pillow's UnidentifiedImageError included) for what is no image or is cut short, and InputError
    for more pixels than Pillow's limit against decompression bombs.
    """
    Image.init()  # registers every format
    formats = [name for name in FORMATS if name in Image.OPEN]  # AVIF and others are optional in Pillow's builds
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path, formats=formats) as image:
                deep_colour = _is_16_bit_colour(path, image)
                frames = getattr(image, "n_frames", 1)
                image.load()
                upright = ImageOps.exif_transpose(image)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            limit = f"at most {Image.MAX_IMAGE_PIXELS:,} pixels"
            raise bad_input(str(path), limit, str(error), "Raise PIL.Image.MAX_IMAGE_PIXELS if you trust it.") from None
        except OSError:
            raise
        except Exception as error:
            # Pillow's decoders report broken files by errors of every kind.
            raise OSError(f"broken image ({type(error).__name__}: {error})") from error
    if deep_colour:
        warnings.warn(f"{path.name}: 16-bit colour read at 8 bits per channel, all that Pillow keeps", stacklevel=2)
    if frames > 1:
        warnings.warn(f"{path.name}: {frames} frames, the first one is used", stacklevel=2)
    return upright


def _is_16_bit_colour(path: Path, image: Image.Image) -> bool:
    if image.mode not in ("RGB", "RGBA", "LA", "CMYK"):
        return False
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(258, ())  # BitsPerSample
        return any(b > 8 for b in (bits if isinstance(bits, tuple) else (bits,)))
    if image.format == "PPM":
        tile = getattr(image, "tile", None)
        arguments = tile[0][3] if tile else ()  # the decoder's: its largest value among them
        return any(
            isinstance(a, int) and a > 255 for a in (arguments if isinstance(arguments, tuple) else (arguments,))
        )
    if image.format != "PNG":
        return False
    with path.open("rb") as file:
        return file.read(25)[24:25] == b"\x10"  # IHDR's bit depth


def from_pillow(image: Image.Image, value_range: Range | None = None) -> tuple[FloatImage, Range, bool]:
    """A Pillow image as ([H, W, C] in [0, 1], source range, last channel is alpha).

    `value_range` counts for images of more than 8 bits and for float images, as in `from_array`.
    """
    mode = image.mode
    if value_range is not None and mode in ("I;16", "I;16L", "I;16B", "I;16N", "I", "F"):
        return from_array(np.asarray(image), value_range, "image")
    if mode in ("I;16", "I;16L", "I;16B", "I;16N", "I"):
        pixels = np.asarray(image, dtype=np.int64)
        if pixels.size and (pixels.min() < 0 or pixels.max() > 65535):
            raise bad_input(
                "integer image",
                "0 to 65535",
                f"{pixels.min()} to {pixels.max()}",
                "Say what maps to 0 and 1: value_range=(low, high).",
            )
        return (pixels[..., None] / 65535).astype(np.float32), (0.0, 65535.0), False
    if mode == "F":
        return np.array(image, dtype=np.float32)[..., None], (0.0, 1.0), False
    if mode in ("LA", "RGBA", "La", "RGBa", "PA") or "transparency" in image.info:
        image = image.convert("LA" if mode in ("L", "LA", "La", "1") else "RGBA")
    elif mode == "1":
        image = image.convert("L")
    elif mode not in ("L", "RGB"):
        image = image.convert("RGB")
    pixels8 = np.asarray(image, dtype=np.float32) / np.float32(255)
    return np.atleast_3d(pixels8), (0.0, 255.0), image.mode in ("LA", "RGBA")


def from_array(array: NDArray[Any] | Tensor, value_range: Range | None, name: str) -> tuple[FloatImage, Range, bool]:
    """An array [H, W] or [H, W, C] as ([H, W, C], source range, last channel is alpha).

    8- and 16-bit integers and booleans have a range of their own; floats are taken as they are; anything else needs
    `value_range`. Two or four channels are read as grey or RGB plus alpha.
    """
    if isinstance(array, Tensor):
        array = array.detach().to("cpu").numpy() if array.dtype != torch.bfloat16 else array.float().cpu().numpy()
    if array.ndim not in (2, 3) or array.size == 0:
        raise bad_input(name, "an array [H, W] or [H, W, C]", list(array.shape), "Pass one image, not empty.")
    if array.ndim == 3 and array.shape[-1] > 4:
        first = array.shape[0]
        hint = (
            "Channels come last: use transpose(1, 2, 0) or permute(1, 2, 0)."
            if first <= 4
            else "Pass a stack of grey images as [N, H, W, 1]; wrap other data in Signal(values)."
        )
        raise bad_input(name, "[H, W, C] with at most 4 channels", list(array.shape), hint)
    if array.ndim == 2:
        array = array[..., None]
    own: dict[str, Range] = {"uint8": (0, 255), "uint16": (0, 65535), "bool": (0, 1)}
    is_float = np.issubdtype(array.dtype, np.floating)
    if value_range is None and not is_float and array.dtype.name not in own:
        raise bad_input(
            name,
            "uint8, uint16, bool or float values",
            array.dtype,
            "Say what maps to 0 and 1: value_range=(low, high).",
        )
    if not is_float and array.dtype.kind not in "uib":
        raise bad_type(name, "numbers", array, f"Its dtype is {array.dtype}.")
    low, high = value_range or own.get(array.dtype.name, (0.0, 1.0))
    if not (np.isfinite((low, high)).all() and high > low):
        raise bad_input("value_range", "(low, high), finite, with high > low", (low, high), "Swap or widen it.")
    scaled = (array.astype(np.float64) - low) / (high - low)
    return scaled.astype(np.float32), (float(low), float(high)), array.shape[-1] in (2, 4)


def apply_alpha(image: FloatImage, has_alpha: bool, alpha: str | None, name: str) -> FloatImage:
    """Do with the alpha channel what was asked for; refuse when nothing was."""
    if alpha is not None:
        check_choice("alpha", alpha, ALPHA_CHOICES)
    if not has_alpha or alpha == "keep":
        return image
    if alpha is None:
        raise bad_input(
            name,
            "a choice for its alpha channel",
            f"{image.shape[-1]} channels and none",
            "Pass alpha='drop', 'black' or 'white' (what shows through), or 'keep' (a channel like the others).",
        )
    colour, opacity = image[..., :-1], image[..., -1:]
    if alpha == "drop":
        return colour
    background = np.float32(1.0 if alpha == "white" else 0.0)
    return (colour * opacity + background * (1 - opacity)).astype(np.float32)


def convert_channels(image: FloatImage, channels: int | None, name: str) -> FloatImage:
    """Grey to RGB by repetition, RGB to grey by Rec. 601 luma."""
    have = image.shape[-1]
    if channels is None or channels == have:
        return image
    if channels == 3 and have == 1:
        return np.repeat(image, 3, axis=-1)
    if channels == 1 and have == 3:
        return (image @ np.array([0.299, 0.587, 0.114], dtype=np.float32))[..., None].clip(0, 1)
    raise bad_input(name, f"an image that converts to {channels} channels", f"{have} channels", "Use channels=1 or 3.")


def check_size(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    """(height, width) in pixels; an int means a square."""
    if size is None:
        return None
    sides = tuple(size) if isinstance(size, Sequence) and not isinstance(size, str) else (size, size)
    if len(sides) != 2 or not all(isinstance(n, Integral) and 1 <= n <= MAX_SIDE for n in sides):
        got = "x".join(map(str, sides))
        raise bad_input("size", f"(height, width) of 1 to {MAX_SIDE} pixels a side", got, "Choose another size.")
    height, width = int(sides[0]), int(sides[1])
    if height * width > MAX_PIXELS:
        raise bad_input("size", f"at most {MAX_PIXELS:,} pixels", f"{height}x{width}", "Choose a smaller size.")
    return height, width


def resize(image: FloatImage, size: tuple[int, int] | None, crop: bool) -> FloatImage:
    """Centre-crop to the aspect ratio of `size` (a square without one), then resize to it (Lanczos, clipped)."""
    height, width = image.shape[:2]
    if crop:
        target_h, target_w = size or (1, 1)
        scale = min(height / target_h, width / target_w)
        new_h, new_w = max(1, round(target_h * scale)), max(1, round(target_w * scale))
        top, left = (height - new_h) // 2, (width - new_w) // 2
        image = image[top : top + new_h, left : left + new_w]
    if size is None or image.shape[:2] == size:
        return np.ascontiguousarray(image)
    planes = [
        np.asarray(Image.fromarray(np.ascontiguousarray(image[..., c])).resize(size[::-1], Image.Resampling.LANCZOS))
        for c in range(image.shape[-1])
    ]
    return np.stack(planes, axis=-1).clip(0, 1)

"""Real images that ship with the package; their licences are in data/NOTICE."""

from __future__ import annotations

from pathlib import Path

from strainer_fast._checks import check_choice
from strainer_fast.signals.load import load
from strainer_fast.signals.signal import Signal

SAMPLES = ("brain-mri", "photos")
SPLITS = ("train", "test", "all")


def samples(name: str, split: str = "train", *, size: int | tuple[int, int] | None = None) -> list[Signal]:
    """Sample images shipped with the package.

    Args:
        name: "brain-mri" (10 + 10 grey slices, 178x178; the test head is another person's) or "photos" (10 + 10
            colour photographs, 256x256).
        split: "train", "test" or "all" (train, then test).
        size: resize to (height, width), or a square.

    Sources and licences: strainer_fast/signals/data/NOTICE.
    """
    return load(sample_folders(f"{name}/{split}"), size=size)


def sample_folders(text: str) -> list[Path]:
    """The folders behind "NAME" (its train images) or "NAME/SPLIT"."""
    name, _, split = text.partition("/")
    check_choice("samples", name, SAMPLES)
    check_choice("split", split or "train", SPLITS)
    folder = Path(__file__).parent / "data" / name
    return [folder / part for part in ("train", "test") if (split or "train") in (part, "all")]

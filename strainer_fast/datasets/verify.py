"""Whether the networks of a folder are what it says: every PSNR measured again, on the signals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from strainer_fast._checks import bad_input
from strainer_fast.datasets.reader import FittedDataset
from strainer_fast.fitting.engine import one_thread
from strainer_fast.fitting.measure import measure_psnr
from strainer_fast.signals import Signal
from strainer_fast.signals.load import Source
from strainer_fast.signals.stream import Stream, stream

TOLERANCE_DB = 1e-3
"""Between implementations of one network; on one machine the bits are the same."""


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        checked: networks whose PSNR was measured again.
        same_bits: those where it is the same number to the last bit.
        worst: largest difference in dB.
        wrong: (source, stored, measured) of those that differ by more than the tolerance.
        changed: sources whose values are not those that were fitted.
        missing: places of signals that have a network but are not in the source.
    """

    checked: int
    same_bits: int
    worst: float
    wrong: list[tuple[str, float, float]]
    changed: list[str]
    missing: list[int]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong, changed or missing."""
        return not (self.wrong or self.changed or self.missing)


def verify(
    dataset: FittedDataset, signals: Source | Iterable[Source] | Stream | None = None, **reading: Any
) -> Verification:
    """Measure the PSNR of every network again, on its signal.

    Args:
        signals: the source, where the folder does not say it (arrays, iterables) or it has moved.
        reading: as of `strainer_fast.signals.stream`; by default as it was read for the fits.

    Raises InputError for a source that cannot be read.
    """
    source = signals if isinstance(signals, Stream) else _source(dataset, signals, reading)
    places = {int(index): i for i, index in enumerate(dataset.indices)}
    checked = same = 0
    worst = 0.0
    wrong: list[tuple[str, float, float]] = []
    changed: list[str] = []
    for index, name, signal in source.read(lambda i: i in places):
        if not isinstance(signal, Signal):
            continue
        place = places.pop(index)
        row = dataset.row(place)
        if signal.fingerprint() != row.signal.fingerprint:
            changed.append(name)
            continue
        weights = {key: w[None] for key, w in dataset.weights(place).items()}
        points, samples = signal.points(), signal.samples()[None]
        if points.shape[0] * dataset.architecture.hidden_features < 2**18:
            with one_thread():
                found = measure_psnr(weights, dataset.architecture.omegas, points, samples)[0]
        else:
            found = measure_psnr(weights, dataset.architecture.omegas, points, samples)[0]
        stored = row.signal.psnr
        checked += 1
        same += found == stored or (math.isnan(found) and math.isnan(stored))
        difference = 0.0 if found == stored else abs(found - stored)
        worst = max(worst, difference)
        if not difference <= TOLERANCE_DB:
            wrong.append((name, stored, found))
    return Verification(checked, same, worst, wrong, changed, sorted(places))


def _source(dataset: FittedDataset, signals: Any, reading: dict[str, Any]) -> Stream:
    description = dataset.settings["source"]
    if signals is None:
        signals = description.get("path")
        if signals is None:
            got = f"none, and the folder was fitted from an {description['kind']}"
            raise bad_input("signals", "the signals that were fitted", got, "Pass them.")
    stored = {name: tuple(v) if isinstance(v, list) else v for name, v in description["reading"].items()}
    shape = description.get("shape")
    extra = {"key": description.get("key"), "label_column": description.get("label_column")}
    if description["kind"] == "csv":
        extra["image_shape"] = tuple(shape[1:])
    return stream(signals, **stored | {name: v for name, v in extra.items() if v is not None} | reading)

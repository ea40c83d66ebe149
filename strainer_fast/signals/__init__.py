"""Signals: images from files, folders, arrays and tensors, as points and values; samples to try things on."""

from strainer_fast.signals.grid import grid
from strainer_fast.signals.load import Skipped, as_signals, load, load_all
from strainer_fast.signals.noise import noise
from strainer_fast.signals.samples import samples
from strainer_fast.signals.signal import Signal, unique_names
from strainer_fast.signals.stream import Stream, stream

__all__ = [
    "Signal",
    "Skipped",
    "Stream",
    "as_signals",
    "grid",
    "load",
    "load_all",
    "noise",
    "samples",
    "stream",
    "unique_names",
]

"""What a fit leaves: the networks of N signals, stacked, with what is known about each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from strainer_fast._checks import check_count
from strainer_fast._files import Shapes, read_tensors, write_tensors
from strainer_fast.fitting.record import EXACT, Curve
from strainer_fast.fitting.rendering import render, render_to
from strainer_fast.models import Architecture, Siren
from strainer_fast.models.encoder import MAX_CHANNELS, MAX_COORDINATES
from strainer_fast.models.siren import siren_from_rows
from strainer_fast.signals import unique_names
from strainer_fast.signals.grid import COORDINATE_CONVENTION

MAX_POINTS = 2**28
"""Bound on a stored size, against files that ask for absurd allocations."""


@dataclass(frozen=True)
class FittedSignal:
    """What is known about one fitted signal.

    psnr is in dB, measured at the end on the weights that are kept, predictions unclamped; infinite when exact.
    seconds is the wall time from its start to its stop, in the company of its stack. stop_reason is "target", "exact"
    (see Recipe.until_exact), "budget", "non_finite" (kept at its last finite weights), "diverged" (kept at its best
    weights; see Recipe.guard_db) or "interrupted".
    """

    name: str
    shape: tuple[int, ...]  # samples per axis
    channels: int
    value_range: tuple[float, float]  # source values that became 0 and 1
    fingerprint: str
    psnr: float
    steps: int
    seconds: float
    stop_reason: str


@dataclass(frozen=True, eq=False)
class FitResult:
    """Fitted networks, stacked, one row per signal in the order they were given.

    Args:
        signals: what is known about each.
        architecture, in_features: of every network.
        weights: stacked [N, ...], named as in BatchedSiren. Where signals differ in channels, heads are padded with
            zeros to the largest number.
        curves: PSNR by step of each signal.
        settings: recipe, initialisation and environment of the run, plain JSON data.
    """

    signals: tuple[FittedSignal, ...]
    architecture: Architecture
    in_features: int
    weights: dict[str, Tensor]
    curves: tuple[Curve, ...]
    settings: dict[str, Any]

    def __len__(self) -> int:
        return len(self.signals)

    @property
    def names(self) -> list[str]:
        """Name of each signal; unique, safe as file names."""
        return [s.name for s in self.signals]

    @property
    def psnr(self) -> list[float]:
        """dB, one per signal."""
        return [s.psnr for s in self.signals]

    @property
    def steps(self) -> list[int]:
        """Optimiser steps behind the kept weights, one per signal."""
        return [s.steps for s in self.signals]

    @property
    def seconds(self) -> list[float]:
        """Wall seconds, one per signal."""
        return [s.seconds for s in self.signals]

    @property
    def stop_reasons(self) -> list[str]:
        """Why each signal stopped."""
        return [s.stop_reason for s in self.signals]

    def module(self, index: int) -> Siren:
        """The network of signal `index` as a Siren (a copy)."""
        channels = self.signals[index].channels
        row = {name: w[index, :channels] if name.startswith("head.") else w[index] for name, w in self.weights.items()}
        return siren_from_rows(row, self.architecture.omegas)

    def render(
        self,
        size: int | Sequence[int] | None = None,
        *,
        window: Sequence[tuple[float, float]] | None = None,
        indices: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
        precision: str = "auto",
    ) -> list[Tensor]:
        """Evaluate the networks on regular grids of any resolution.

        Args:
            size: samples per axis, (height, width) for images; an int for the same on every axis; None for each
                signal's own.
            window: (low, high) per axis in [-1, 1], y first: the part of the square to show; None is all of it.
            indices: which signals; None is all.
            precision: of products; see `strainer_fast.render`. A signal that stopped as "exact" is drawn in fp32 where
                nothing else is asked for: tf32x3 might round a value on the edge between two levels to the other one.

        Returns:
            One tensor [*size, C] per signal, not clamped.
        """
        chosen = range(len(self)) if indices is None else indices
        sizes = [self.signals[i].shape if size is None else size for i in chosen]
        return [
            render(self.module(i).to(device), own, window, precision=self._precision(i, precision))
            for i, own in zip(chosen, sizes, strict=True)
        ]

    def render_to(
        self,
        path: str | Path,
        index: int = 0,
        size: int | Sequence[int] | None = None,
        *,
        window: Sequence[tuple[float, float]] | None = None,
        device: torch.device | str = "cpu",
        precision: str = "auto",
    ) -> Path:
        """Evaluate one network into a .png or .npy file, in memory that does not grow with the size.

        A PNG has 8 bits a channel, 16 where the source had more. See `render` and `strainer_fast.render_to`.
        """
        signal = self.signals[index]
        bits = 16 if signal.value_range[1] > 255 else 8
        network, precision = self.module(index).to(device), self._precision(index, precision)
        return render_to(network, path, signal.shape if size is None else size, window, bits=bits, precision=precision)

    def _precision(self, index: int, asked: str) -> str:
        """Of rendering a signal: the one in which its values were found right, if they were."""
        return "fp32" if asked == "auto" and self.signals[index].stop_reason == EXACT else asked

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file, whole or not at all."""
        tensors = dict(self.weights)
        tensors["curves.psnr"] = torch.from_numpy(np.concatenate([c.psnr for c in self.curves]))
        tensors["curves.seconds"] = torch.from_numpy(np.concatenate([c.seconds for c in self.curves]))
        metadata = {
            "in_features": self.in_features,
            "architecture": self.architecture.as_dict(),
            "coordinates": COORDINATE_CONVENTION,
            "curve_lengths": [len(c.psnr) for c in self.curves],
            "settings": self.settings,
            "signals": [signal_data(s) for s in self.signals],
        }
        write_tensors(Path(path), "fit", tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> FitResult:
        """Read what `save` wrote.

        Raises InputError for a file that is missing, cut short, damaged, not ours or of another format version.
        """
        tensors, document = read_tensors(Path(path), "fit", _file_shapes)
        lengths = document["curve_lengths"]
        psnr = np.split(tensors.pop("curves.psnr").numpy(), np.cumsum(lengths)[:-1])
        seconds = np.split(tensors.pop("curves.seconds").numpy(), np.cumsum(lengths)[:-1])
        return cls(
            tuple(signal_from_data(data) for data in document["signals"]),
            Architecture(**document["architecture"]),
            document["in_features"],
            tensors,
            tuple(Curve(p, s) for p, s in zip(psnr, seconds, strict=True)),
            document["settings"],
        )


def signal_data(signal: FittedSignal) -> dict[str, Any]:
    """Plain JSON data; an infinite PSNR becomes null with exact = true."""
    exact = signal.psnr == float("inf")
    return {
        "name": signal.name,
        "shape": list(signal.shape),
        "channels": signal.channels,
        "value_range": list(signal.value_range),
        "fingerprint": signal.fingerprint,
        "psnr": signal.psnr if np.isfinite(signal.psnr) else None,
        "exact": exact,
        "steps": signal.steps,
        "seconds": signal.seconds,
        "stop_reason": signal.stop_reason,
    }


def signal_from_data(data: dict[str, Any]) -> FittedSignal:
    psnr = data["psnr"] if data["psnr"] is not None else float("inf" if data["exact"] else "nan")
    low, high = data["value_range"]
    return FittedSignal(
        str(data["name"]),
        tuple(int(n) for n in data["shape"]),
        int(data["channels"]),
        (float(low), float(high)),
        str(data["fingerprint"]),
        float(psnr),
        int(data["steps"]),
        float(data["seconds"]),
        str(data["stop_reason"]),
    )


def _file_shapes(document: dict[str, Any]) -> Shapes:
    architecture = Architecture(**document["architecture"])
    in_features = check_count("in_features", document["in_features"], 1, MAX_COORDINATES)
    signals = [signal_from_data(data) for data in document["signals"]]
    lengths = document["curve_lengths"]
    num = len(signals)
    if num == 0 or len(lengths) != num or any(len(s.shape) != in_features for s in signals):
        raise ValueError("signals, curves and coordinates do not belong together")
    names = [s.name for s in signals]
    if names != unique_names(names):
        raise ValueError("names that are no safe file names")
    if any(min(s.shape) < 1 or math.prod(s.shape) > MAX_POINTS for s in signals):
        raise ValueError("sizes out of range")
    channels = check_count("channels", max(s.channels for s in signals), 1, MAX_CHANNELS)
    shapes: Shapes = {"curves.psnr": (sum(lengths),), "curves.seconds": (sum(lengths),)}
    for i, (out, width) in enumerate(architecture.layer_shapes(in_features)):
        shapes |= {f"layers.{i}.weight": (num, out, width), f"layers.{i}.bias": (num, out)}
    shapes |= {"head.weight": (num, channels, architecture.hidden_features), "head.bias": (num, channels)}
    return shapes

"""The folder that a fit leaves: weights, tables and pictures a person can open."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from strainer_fast._files import atomic_writer
from strainer_fast._png import write_png
from strainer_fast.fitting.rendering import quantised
from strainer_fast.fitting.result import FitResult
from strainer_fast.signals import Signal

WEIGHTS = "weights.safetensors"
PREVIEWS = "previews"
RESULT_FIELDS = ("name", "height", "width", "channels", "psnr", "steps", "seconds", "stop_reason")
ERROR_GAIN = 10
"""Previews show ten times the absolute error."""


def write_tables(result: FitResult, folder: Path) -> list[Path]:
    """weights.safetensors, results.csv and curves.csv; each whole or not at all. Returns their paths."""
    result.save(folder / WEIGHTS)
    summary = [
        (s.name, *_height_width(s.shape), s.channels, f"{s.psnr:.4f}", s.steps, f"{s.seconds:.3f}", s.stop_reason)
        for s in result.signals
    ]
    curves = [
        (s.name, step, f"{seconds:.4f}", f"{psnr:.4f}")
        for s, curve in zip(result.signals, result.curves, strict=True)
        for step, (psnr, seconds) in enumerate(zip(curve.psnr, curve.seconds, strict=True))
        if not np.isnan(psnr)  # not measured; see Curve
    ]
    _write_csv(folder / "results.csv", RESULT_FIELDS, summary)
    _write_csv(folder / "curves.csv", ("name", "step", "seconds", "psnr"), curves)
    return [folder / WEIGHTS, folder / "results.csv", folder / "curves.csv"]


def write_previews(result: FitResult, signals: Sequence[Signal], folder: Path) -> list[Path]:
    """For each fitted image a PNG: truth, fit, and absolute error times ten, side by side."""
    by_name = {s.name: s for s in signals}
    (folder / PREVIEWS).mkdir(exist_ok=True)
    paths = []
    for i, fitted in enumerate(result.signals):
        if len(fitted.shape) != 2:
            continue
        truth = by_name[fitted.name].values
        rendered = result.render(indices=[i])[0]
        error = (rendered - truth).abs() * ERROR_GAIN
        # Alpha would hide the error, so previews show colour channels only.
        colour = {1: 1, 2: 1}.get(fitted.channels, 3)
        panels = np.concatenate([quantised(t[..., :colour], 8) for t in (truth, rendered, error)], axis=1)
        paths.append(folder / PREVIEWS / f"{fitted.name}.png")
        with atomic_writer(paths[-1]) as file:
            height, width, channels = panels.shape
            write_png(file, [panels], height, width, channels, 8)
    return paths


def output_bytes(num_signals: int, parameters: int, points: int, steps: int) -> int:
    """About what a finished folder needs: weights, previews, curves."""
    return num_signals * (4 * parameters + 9 * points + 60 * steps)


def _height_width(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 2 else (1, shape[0])


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header)
    writer.writerows(rows)
    with atomic_writer(path) as file:
        file.write(text.getvalue().encode())

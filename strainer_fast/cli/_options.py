"""Options that several verbs share, and how their text is read."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from strainer_fast._checks import InputError, bad_input
from strainer_fast.cli._console import Reporter
from strainer_fast.fitting import Recipe, recipe
from strainer_fast.models import Architecture
from strainer_fast.ops import explain
from strainer_fast.signals import Signal, Skipped, load_all
from strainer_fast.signals.samples import sample_folders

_IMAGES = typer.Argument(help="Image files and folders, or samples:brain-mri/train (test, all), samples:photos/...")
Images = Annotated[list[str], _IMAGES]
OptionalImages = Annotated[list[str] | None, _IMAGES]
RecipeName = Annotated[str, typer.Option("--recipe", help="How to optimise; see `strainer-fast recipes`.")]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", help="FIELD=VALUE of the recipe, for example --set freeze=2. Repeatable."),
]
Steps = Annotated[int | None, typer.Option(help="Optimiser steps; the recipe's by default.")]
Seed = Annotated[int | None, typer.Option(help="Of the random numbers; 0 by default.")]
Size = Annotated[str | None, typer.Option(help="Resize to HxW (or N for NxN); images keep their size without it.")]
Crop = Annotated[bool, typer.Option("--crop", help="Cut to the aspect ratio of --size first, instead of stretching.")]
Channels = Annotated[int | None, typer.Option(help="Convert to 1 (grey) or 3 (RGB) channels.")]
Alpha = Annotated[str | None, typer.Option(help="For images with alpha: drop, black, white (background) or keep.")]
Implementation = Annotated[str, typer.Option(help="What computes; see `strainer-fast doctor`.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; PyTorch's choice by default.", min=1, max=1024)]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but warnings and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout; progress goes to stderr.")]
ValueRange = Annotated[
    str | None, typer.Option(help="LOW,HIGH: what maps to 0 and 1 in images that are not 8-bit, such as float TIFF.")
]
HiddenFeatures = Annotated[int | None, typer.Option(help="Width of the sine layers (256).")]
NumLayers = Annotated[int | None, typer.Option(help="All linear layers counted, the last included (6).")]
SharedLayers = Annotated[int | None, typer.Option(help="Sine layers in the shared encoder (all, by default).")]
OmegaText = Annotated[
    str | None, typer.Option("--omega", help="Frequency scale: one number, or one per sine layer, 30,10,... (30).")
]
Key = Annotated[str | None, typer.Option(help="Which array of an .npz.")]
ImageShape = Annotated[str | None, typer.Option(help="HxW or HxWxC of the images in a .csv (square, grey).")]
LabelColumn = Annotated[int | None, typer.Option(help="A column of a .csv that is no pixel; -1 is the last one.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is already in the output.")]


def parse_size(text: str | None) -> tuple[int, int] | None:
    """ "178x120" or "178" as (height, width)."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,9})(?:[xX](\d{1,9}))?", text.strip())
    if match is None:
        raise bad_input("--size", "HxW, for example 178x178, or one number", repr(text), "Sizes are in pixels.")
    return int(match[1]), int(match[2] or match[1])


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """ "28x28" or "32x32x3" as numbers."""
    if text is None:
        return None
    sides = text.lower().split("x")
    if len(sides) not in (2, 3) or not all(side.isdigit() and int(side) > 0 for side in sides):
        raise bad_input("--image-shape", "HxW or HxWxC, for example 28x28", repr(text), "Sizes are in pixels.")
    return tuple(int(side) for side in sides)


def make_architecture(
    hidden_features: int | None, num_layers: int | None, num_shared_layers: int | None, omega: str | None
) -> Architecture:
    """The paper's network with the options that were given; all sine layers shared unless told otherwise."""
    layers = 6 if num_layers is None else num_layers
    numbers = (30.0,) if omega is None else parse_numbers("--omega", omega)
    return Architecture(
        256 if hidden_features is None else hidden_features,
        layers,
        max(1, layers - 1) if num_shared_layers is None else num_shared_layers,
        numbers[0] if len(numbers) == 1 else numbers,
    )


def parse_numbers(option: str, text: str, count: int | None = None) -> tuple[float, ...]:
    """Numbers separated by commas; `count` of them, if given."""
    what = f"{count or ''} numbers separated by commas".strip()
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or (count is not None and len(numbers) != count):
        raise bad_input(option, what, repr(text), "For example 0.5,1.")
    return numbers


def parse_window(text: str | None) -> list[tuple[float, float]] | None:
    """ "y0,x0,y1,x1" as [(y0, y1), (x0, x1)]."""
    if text is None:
        return None
    y0, x0, y1, x1 = parse_numbers("--window", text, 4)
    return [(y0, y1), (x0, x1)]


def read_signals(
    sources: list[str],
    size: str | None,
    crop: bool,
    channels: int | None,
    alpha: str | None,
    value_range: str | None,
    reporter: Reporter,
) -> tuple[list[Signal], list[Skipped]]:
    """Read all images; name those that cannot be read; fail when none can."""
    paths: list[Any] = []
    for source in sources:
        paths += sample_folders(source.removeprefix("samples:")) if source.startswith("samples:") else [Path(source)]
    bounds = None if value_range is None else parse_numbers("--value-range", value_range, 2)
    signals, skipped = load_all(
        paths,
        size=parse_size(size),
        crop=crop,
        channels=channels,
        alpha=alpha,
        value_range=None if bounds is None else (bounds[0], bounds[1]),
    )
    for bad in skipped:
        reporter.warn(f"skipped {bad.source}: {bad.reason}")
    if not signals:
        raise InputError(f"none of the {len(skipped)} files could be read")
    return signals, skipped


def make_recipe(name: str, fields: list[str] | None = None, **changes: Any) -> Recipe:
    """The preset with the options that were given; `fields` as of --set, which the others overrule."""
    given = dict(_parse_field(text) for text in fields or ())
    return recipe(name, **given | {field: value for field, value in changes.items() if value is not None})


def _parse_field(text: str) -> tuple[str, Any]:
    """ "FIELD=VALUE": VALUE is a number, true, false, null, [..], or else a word."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise bad_input("--set", "FIELD=VALUE", repr(text), "For example --set freeze=2.")
    try:
        return name.strip(), json.loads(value)
    except json.JSONDecodeError:
        return name.strip(), value.strip()


def set_up(threads: int | None, implementation: str, device: str) -> str:
    """Apply --threads; returns what will run, in words (and fails here if it cannot)."""
    if threads is not None:
        torch.set_num_threads(threads)
    return f"{explain(implementation, device)}; {torch.get_num_threads()} CPU threads"


def later_rank() -> bool:
    """Whether torchrun has started this process beside a first one, which speaks and writes for all."""
    return "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("RANK", "0") != "0"


@contextmanager
def process_group(device: str) -> Iterator[int | None]:
    """Joins the processes that torchrun has started and yields this one's rank; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield None
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield torch.distributed.get_rank()
    finally:
        torch.distributed.destroy_process_group()

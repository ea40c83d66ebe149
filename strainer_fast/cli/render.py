"""strainer-fast render"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strainer_fast._checks import bad_input
from strainer_fast._files import check_writable
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import Reporter, handled
from strainer_fast.fitting import FitResult
from strainer_fast.fitting.output import WEIGHTS
from strainer_fast.ops import choose_device


@handled
def render(
    file: Annotated[Path, typer.Argument(help="weights.safetensors of a fit, or its folder.")],
    out: Annotated[Path, typer.Option(help="Folder for the images.")],
    size: Annotated[str | None, typer.Option(help="HxW (or N for NxN); each image's own size without it.")] = None,
    window: Annotated[
        str | None, typer.Option(help="Part of the coordinate square to show: y0,x0,y1,x1 in [-1, 1].")
    ] = None,
    only: Annotated[list[str] | None, typer.Option(help="Name of an image to render; repeat for more.")] = None,
    format: Annotated[str, typer.Option(help="png; npy for the values as they are, float32.")] = "png",
    precision: Annotated[
        str,
        typer.Option(
            help="auto (tf32x3 on an A100 or H100), fp32; on a GPU also tf32, fp16, bf16: faster, less exact."
        ),
    ] = "auto",
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Draw fitted networks at any resolution, whole or in part; memory does not grow with the size."""
    reporter = Reporter(quiet, json)
    opt.set_up(threads, "auto", device)
    result = FitResult.load(file / WEIGHTS if file.is_dir() else file)
    shape, bounds = opt.parse_size(size), opt.parse_window(window)
    if result.in_features != 2:
        raise bad_input(str(file), "networks of images (2 coordinates)", result.in_features, "Use FitResult.render.")
    unknown = sorted(set(only or ()) - set(result.names))
    if unknown:
        raise bad_input("--only", f"names among {', '.join(result.names)}", ", ".join(unknown), "See `inspect`.")
    check_writable(out)
    where, files = choose_device(device), []
    for i, signal in enumerate(result.signals):
        if only and signal.name not in only:
            continue
        drawn = signal.shape if shape is None else shape
        path = out / f"{signal.name}_{drawn[0]}x{drawn[1]}.{format}"
        result.render_to(path, i, drawn, window=bounds, device=where, precision=precision)
        reporter.say(f"wrote {path}")
        files.append(str(path))
    reporter.emit({"files": files})

"""strainer-fast fit-dataset"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from strainer_fast._checks import bad_input
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import EXIT_PARTIAL, Reporter, handled
from strainer_fast.datasets import DatasetProgress, FittedDataset
from strainer_fast.datasets import fit_dataset as run_fit_dataset
from strainer_fast.fitting.fitter import RANDOM
from strainer_fast.models import Encoder
from strainer_fast.signals.stream import Stream, stream


@handled
def fit_dataset(
    source: Annotated[Path, typer.Argument(help="A folder, .npy, .npz, .csv or IDX file of images.")],
    out: Annotated[Path, typer.Option(help="Folder for the networks.")],
    init: Annotated[str, typer.Option(help="An encoder file; siren: random networks; shared: one for all.")] = "siren",
    target_psnr: Annotated[float | None, typer.Option(help="Stop each signal once it reaches this many dB.")] = None,
    start: Annotated[str | None, typer.Option(help="Decoder to start from: random, least_squares, mean.")] = None,
    recipe: opt.RecipeName = "fast",
    fields: opt.Changes = None,
    steps: opt.Steps = None,
    seed: opt.Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what is in the folder.")] = False,
    overwrite: opt.Overwrite = False,
    shard: Annotated[str, typer.Option(help="I/N: take every N-th signal from the I-th on (from 0).")] = "0/1",
    engine: Annotated[str, typer.Option(help="local, or ray: the workers of a Ray cluster.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Of engine ray; by default one for each core or GPU.")] = None,
    num_parallel: Annotated[str, typer.Option(help="Signals at a time, or auto.")] = "auto",
    key: opt.Key = None,
    image_shape: opt.ImageShape = None,
    label_column: opt.LabelColumn = None,
    size: opt.Size = None,
    crop: opt.Crop = False,
    channels: opt.Channels = None,
    alpha: opt.Alpha = None,
    value_range: opt.ValueRange = None,
    hidden_features: opt.HiddenFeatures = None,
    num_layers: opt.NumLayers = None,
    omega: opt.OmegaText = None,
    implementation: opt.Implementation = "auto",
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Fit a network to every signal of a data set; killed, the same command with --resume goes on.

    Exit code 3: done, but some files could not be read (skipped.csv) or some fits diverged (index.csv).
    """
    reporter = Reporter(quiet, json)
    settings = opt.make_recipe(recipe, fields, steps=steps, seed=seed, start=start, target_psnr=target_psnr)
    if init not in RANDOM and (hidden_features, num_layers, omega) != (None, None, None):
        got = "--hidden-features, --num-layers or --omega"
        raise bad_input("options", "none about the network beside an encoder", got, "The encoder brings its own.")
    encoder = None if init in RANDOM else Encoder.load(init)
    architecture = None if encoder else opt.make_architecture(hidden_features, num_layers, None, omega)
    running_on = opt.set_up(threads, implementation, device)
    signals = open_stream(source, key, image_shape, label_column, size, crop, channels, alpha, value_range)
    number = "unknown number of" if signals.number is None else signals.number
    reporter.say(f"{number} signals; {architecture or (encoder and encoder.architecture)}; from {init}")
    reporter.say(f"running on {running_on}")
    last: list[DatasetProgress] = []
    part = _parse_shard(shard)
    own = 0 if signals.number is None else len(range(part[0], signals.number, part[1]))
    with reporter.progress("fitting", own, "signals") as update:

        def show(progress: DatasetProgress) -> None:
            last[:] = [progress]
            rate = progress.fitted / max(progress.seconds, 1e-9)
            update(progress.finished + progress.skipped, f"{rate:.1f} fits/s, {progress.psnr:.1f} dB")

        dataset = run_fit_dataset(
            signals,
            out,
            encoder or init,
            settings,
            architecture=architecture,
            num_parallel="auto" if num_parallel == "auto" else _parse_count(num_parallel),
            resume=resume,
            overwrite=overwrite,
            shard=part,
            engine=engine,
            workers=workers,
            implementation=implementation,
            device=device,
            on_progress=show,
        )
    summary = _summarise(dataset, last[-1], reporter)
    reporter.emit({"out": str(out)} | summary)
    if summary["skipped"] or summary["diverged"]:
        raise typer.Exit(EXIT_PARTIAL)


def _summarise(dataset: FittedDataset, run: DatasetProgress, reporter: Reporter) -> dict[str, Any]:
    stops: dict[str, int] = {}
    psnr, steps = [], []
    for row in dataset.rows():
        stops[row.signal.stop_reason] = stops.get(row.signal.stop_reason, 0) + 1
        psnr.append(row.signal.psnr)
        steps.append(row.signal.steps)
    psnr.sort()
    steps.sort()
    middle = len(psnr) // 2
    diverged = sum(stops.get(reason, 0) for reason in ("diverged", "non_finite"))
    listing = ", ".join(f"{count} by {reason}" for reason, count in sorted(stops.items()))
    reporter.say(
        f"{run.fitted} signals fitted in {run.seconds:.1f} s ({run.fitted / max(run.seconds, 1e-9):.1f} fits/s); "
        f"{len(dataset)} in {dataset.folder}"
    )
    if psnr:
        reporter.say(f"median {psnr[middle]:.2f} dB after {steps[middle]} steps; stopped: {listing}")
    if run.skipped:
        reporter.warn(f"{run.skipped} files were skipped: see skipped.csv")
    if diverged:
        reporter.warn(f"{diverged} fits diverged: see stop_reason in index.csv")
    reporter.say(f"next: strainer-fast verify {dataset.folder}")
    return {
        "fitted": run.fitted,
        "networks": len(dataset),
        "seconds": run.seconds,
        "skipped": run.skipped,
        "diverged": diverged,
        "stops": stops,
        "median_psnr": psnr[middle] if psnr and psnr[middle] < float("inf") else None,
    }


def open_stream(
    source: Path,
    key: str | None,
    image_shape: str | None,
    label_column: int | None,
    size: str | None,
    crop: bool,
    channels: int | None,
    alpha: str | None,
    value_range: str | None,
) -> Stream:
    """The source with its options, as text."""
    bounds = None if value_range is None else opt.parse_numbers("--value-range", value_range, 2)
    return stream(
        source,
        key=key,
        image_shape=opt.parse_shape(image_shape),
        label_column=label_column,
        size=opt.parse_size(size),
        crop=crop,
        channels=channels,
        alpha=alpha,
        value_range=None if bounds is None else (bounds[0], bounds[1]),
    )


def _parse_shard(text: str) -> tuple[int, int]:
    """ "2/8" as (2, 8)."""
    index, slash, number = text.partition("/")
    if not slash or not index.isdigit() or not number.isdigit() or not int(index) < int(number):
        raise bad_input("--shard", "I/N with I below N, for example 0/8", repr(text), "Shards count from 0.")
    return int(index), int(number)


def _parse_count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise bad_input("--num-parallel", "auto or a number", repr(text), "For example 256.")
    return int(text)

"""strainer-fast fit"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from strainer_fast._checks import InputError, bad_input
from strainer_fast._files import check_writable
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import EXIT_PARTIAL, Reporter, decibels, handled, table
from strainer_fast.fitting import FitResult, Interrupted, Progress
from strainer_fast.fitting import fit as run_fit
from strainer_fast.fitting.fitter import RANDOM
from strainer_fast.fitting.output import PREVIEWS, WEIGHTS, output_bytes, write_previews, write_tables
from strainer_fast.fitting.result import signal_data
from strainer_fast.models import Architecture, Encoder
from strainer_fast.signals import Signal

SAVE_SHARE = 20
"""What is finished is saved at once, unless saving would take more than a twentieth of the time."""


@handled
def fit(
    images: opt.Images,
    out: Annotated[Path, typer.Option(help="Folder for weights, tables and previews.")],
    init: Annotated[str, typer.Option(help="An encoder file; siren: random networks; shared: one for all.")] = "siren",
    target_psnr: Annotated[float | None, typer.Option(help="Stop each image once it reaches this many dB.")] = None,
    start: Annotated[str | None, typer.Option(help="Decoder to start from: random, least_squares, mean.")] = None,
    recipe: opt.RecipeName = "fast",
    fields: opt.Changes = None,
    steps: opt.Steps = None,
    seed: opt.Seed = None,
    size: opt.Size = None,
    crop: opt.Crop = False,
    channels: opt.Channels = None,
    alpha: opt.Alpha = None,
    value_range: opt.ValueRange = None,
    hidden_features: opt.HiddenFeatures = None,
    num_layers: opt.NumLayers = None,
    omega: opt.OmegaText = None,
    overwrite: opt.Overwrite = False,
    implementation: opt.Implementation = "auto",
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Fit a network to each image, from a STRAINER encoder or from scratch.

    Interrupted, the same command continues with the images that are not finished. The sizes of the network
    (--hidden-features, --num-layers, --omega) are for --init siren or shared; an encoder brings its own.
    """
    reporter = Reporter(quiet, json)
    settings = opt.make_recipe(recipe, fields, steps=steps, seed=seed, start=start, target_psnr=target_psnr)
    encoder = None if init in RANDOM else Encoder.load(init)
    if encoder is not None and (hidden_features, num_layers, omega) != (None, None, None):
        got = "--hidden-features, --num-layers or --omega"
        raise bad_input("options", "none about the network beside an encoder", got, "The encoder brings its own.")
    architecture = encoder.architecture if encoder else opt.make_architecture(hidden_features, num_layers, None, omega)
    running_on = opt.set_up(threads, implementation, device)
    signals, skipped = opt.read_signals(images, size, crop, channels, alpha, value_range, reporter)
    _prepare_folder(out, signals, architecture, settings.steps)
    done = None if overwrite else _earlier_result(out)

    reporter.say(f"{len(signals)} signals; {architecture}; from {init}")
    reporter.say(f"running on {running_on}")
    if done is not None:
        kept = sum(reason != "interrupted" for reason in done.stop_reasons)
        reporter.say(f"{kept} of {len(signals)} are in {out} already")
    next_save = 0.0

    def save(result: FitResult) -> None:
        nonlocal next_save
        begin = time.monotonic()
        if begin < next_save:
            return
        try:
            write_tables(result, out)
        except OSError as error:
            reporter.warn(f"could not save yet, going on: {error}")
        end = time.monotonic()
        next_save = end + SAVE_SHARE * (end - begin)

    try:
        with reporter.progress("fitting", len(signals) * settings.steps) as update:
            result = run_fit(
                signals,
                encoder or init,
                settings,
                architecture=None if encoder else architecture,
                done=done,
                implementation=implementation,
                device=device,
                on_check=_shower(update, settings.steps),
                on_result=save,
            )
    except Interrupted as stop:
        if stop.result is not None:
            write_tables(stop.result, out)
        raise Interrupted(f"{stop}; kept in {out}. Run the same command again to go on.") from None
    files = [*write_tables(result, out), *write_previews(result, signals, out)]
    _summarise(result, reporter, out, len(files) - 3)
    diverged = sum(reason in ("non_finite", "diverged") for reason in result.stop_reasons)
    if diverged:
        reporter.warn(f"{diverged} signals had a loss that was not finite: kept their last finite weights")
    if skipped:
        reporter.warn(f"{len(skipped)} of {len(skipped) + len(signals)} files were skipped")
    reporter.emit(
        {
            "out": str(out),
            "signals": [signal_data(s) for s in result.signals],
            "skipped": [vars(s) for s in skipped],
            "files": [str(f) for f in files],
            "settings": result.settings,
        }
    )
    if skipped or diverged:
        raise typer.Exit(EXIT_PARTIAL)


def _prepare_folder(out: Path, signals: list[Signal], architecture: Architecture, steps: int) -> None:
    """Check that the folder takes the output."""
    if out.exists() and not out.is_dir():
        raise bad_input("--out", "a folder", f"the file {out}", "Choose another name.")
    parameters = architecture.hidden_features**2 * architecture.num_layers
    points = max(s.samples().shape[0] for s in signals)
    check_writable(out, output_bytes(len(signals), parameters, points, steps))
    if (out / PREVIEWS).exists() and not (out / PREVIEWS).is_dir():
        raise bad_input("--out", f"no file called {PREVIEWS} in it", out / PREVIEWS, "Move it away.")


def _earlier_result(out: Path) -> FitResult | None:
    """What an earlier run left there."""
    earlier = out / WEIGHTS
    if not earlier.exists():
        return None
    try:
        return FitResult.load(earlier)
    except InputError as error:
        raise InputError(f"{error} Pass --overwrite, or choose another --out.") from None


def _shower(update: Any, steps: int) -> Any:
    reached: dict[int, int] = {}

    def show(progress: Progress) -> None:
        reached.update(zip(progress.running, progress.done, strict=True))
        mean = sum(progress.psnr) / len(progress.psnr)
        more = f" (mean of {len(progress.psnr)})" if len(progress.psnr) > 1 else ""
        running = set(progress.running)
        done = sum(step if index in running else steps for index, step in reached.items())
        update(done, f"{mean:.1f} dB{more}")

    return show


def _summarise(result: FitResult, reporter: Reporter, out: Path, previews: int) -> None:
    rows = [
        (
            s.name,
            "x".join(map(str, s.shape)),
            str(s.channels),
            decibels(s.psnr),
            str(s.steps),
            f"{s.seconds:.1f}",
            s.stop_reason,
        )
        for s in result.signals
    ]
    reporter.say(table(("name", "size", "channels", "PSNR dB", "steps", "seconds", "stopped by"), rows))
    reporter.say(f"wrote {out / WEIGHTS}, results.csv, curves.csv and {previews} previews")
    reporter.say(f"next: strainer-fast render {out} --size 1024x1024 --out {out}/large")

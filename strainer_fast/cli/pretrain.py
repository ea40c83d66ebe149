"""strainer-fast pretrain"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strainer_fast._checks import bad_input
from strainer_fast._files import check_writable
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import EXIT_PARTIAL, Reporter, decibels, handled
from strainer_fast.fitting import Progress
from strainer_fast.fitting import pretrain as run_pretrain
from strainer_fast.models import Architecture, Encoder


@handled
def pretrain(
    images: opt.Images,
    out: Annotated[Path, typer.Option(help="File to write the encoder to.")] = Path("encoder.safetensors"),
    recipe: opt.RecipeName = "paper",
    steps: opt.Steps = None,
    seed: opt.Seed = 0,
    size: opt.Size = None,
    crop: opt.Crop = False,
    channels: opt.Channels = None,
    alpha: opt.Alpha = None,
    value_range: opt.ValueRange = None,
    hidden_features: opt.HiddenFeatures = None,
    num_layers: opt.NumLayers = None,
    num_shared_layers: opt.SharedLayers = None,
    omega: opt.OmegaText = None,
    checkpoint_seconds: Annotated[float, typer.Option(help="How often to save the unfinished state.", min=0)] = 30.0,
    overwrite: opt.Overwrite = False,
    implementation: opt.Implementation = "auto",
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Learn a STRAINER encoder from images of one kind.

    Killed or interrupted, the same command continues where it was and ends with the same bits.
    """
    reporter = Reporter(quiet, json)
    settings = opt.make_recipe(recipe, pretrain_steps=steps, seed=seed)
    architecture = opt.make_architecture(hidden_features, num_layers, num_shared_layers, omega)
    running_on = opt.set_up(threads, implementation, device)
    signals, skipped = opt.read_signals(images, size, crop, channels, alpha, value_range, reporter)
    checkpoint = out.with_name(out.name + ".checkpoint")
    if out.is_dir():
        raise bad_input("--out", "a file", f"the folder {out}", "For example encoder.safetensors.")
    # Parameters, two Adam moments, and the old file beside the new one.
    check_writable(out.parent, 8 * 4 * architecture.hidden_features**2 * architecture.num_layers)
    if out.exists() and not checkpoint.exists() and not overwrite:
        _check_same(Encoder.load(out), settings.as_dict(), architecture, [s.fingerprint() for s in signals], out)
        reporter.say(f"{out} is complete already; nothing to do (--overwrite begins anew)")
        reporter.emit({"out": str(out), "complete": True, "skipped": [vars(s) for s in skipped]})
        raise typer.Exit(EXIT_PARTIAL if skipped else 0)

    reporter.say(f"{len(signals)} signals of {'x'.join(map(str, signals[0].values.shape))}; {architecture}")
    reporter.say(f"running on {running_on}")
    if checkpoint.exists():
        reporter.say(f"continuing from {checkpoint}")
    with reporter.progress("pre-training", settings.pretrain_steps) as update:

        def show(progress: Progress) -> None:
            update(progress.step, f"{min(progress.psnr):.1f} to {max(progress.psnr):.1f} dB")

        encoder = run_pretrain(
            signals,
            settings,
            architecture=architecture,
            checkpoint=checkpoint,
            checkpoint_seconds=checkpoint_seconds,
            discard=overwrite,
            implementation=implementation,
            device=device,
            on_check=show,
        )
    encoder.save(out)
    checkpoint.unlink(missing_ok=True)

    record = encoder.record
    known = [p for p in record["psnr"] if p is not None]
    spread = f"{decibels(min(known))} to {decibels(max(known))} dB" if known else "no finite PSNR"
    reporter.say(f"{record['steps']} steps in {record['seconds']:.1f} s; PSNR of the training signals {spread}")
    diverged = record["stop_reason"] != "budget"
    if diverged:
        reporter.warn(f"the loss was not finite after step {record['steps']}: kept the last finite weights")
    reporter.say(f"wrote {out}")
    reporter.say(f"next: strainer-fast fit NEW_IMAGES --init {out} --out fits")
    reporter.emit({"out": str(out), "complete": True, "record": record, "skipped": [vars(s) for s in skipped]})
    if skipped:
        reporter.warn(f"{len(skipped)} of {len(skipped) + len(signals)} files were skipped")
    if skipped or diverged:
        raise typer.Exit(EXIT_PARTIAL)


def _check_same(
    encoder: Encoder, recipe: dict[str, object], architecture: Architecture, fingerprints: list[str], out: Path
) -> None:
    same = (
        encoder.record.get("recipe") == recipe
        and encoder.architecture == architecture
        and encoder.record.get("fingerprints") == fingerprints
    )
    if not same:
        raise bad_input(
            "--out", "a new file", f"{out}, an encoder of another run", "Choose another file, or --overwrite."
        )

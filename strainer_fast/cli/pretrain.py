"""strainer-fast pretrain"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strainer_fast._checks import bad_input, check_choice
from strainer_fast._files import check_writable
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import EXIT_PARTIAL, Reporter, decibels, handled
from strainer_fast.fitting import Progress
from strainer_fast.fitting import pretrain as run_pretrain
from strainer_fast.models import Architecture, Encoder
from strainer_fast.signals import noise
from strainer_fast.signals.noise import KINDS


@handled
def pretrain(
    images: opt.OptionalImages = None,
    out: Annotated[Path, typer.Option(help="File to write the encoder to.")] = Path("encoder.safetensors"),
    source: Annotated[
        str, typer.Option(help="images; noise:uniform (gaussian, spectrum, dead-leaves); or images+noise:uniform.")
    ] = "images",
    noise_count: Annotated[int, typer.Option(help="How many signals of noise.", min=1)] = 10,
    noise_amplitude: Annotated[float, typer.Option(help="Of the noise about 0.5, up to 1.")] = 1.0,
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
    """Learn a STRAINER encoder from images of one kind, from noise, or from both.

    Killed or interrupted, the same command continues where it was and ends with the same bits. Several processes share
    the images under torchrun: torchrun --nproc-per-node 4 --no-python strainer-fast pretrain ...
    """
    reporter = Reporter(quiet or opt.later_rank(), json and not opt.later_rank())
    settings = opt.make_recipe(recipe, fields, pretrain_steps=steps, seed=seed)
    architecture = opt.make_architecture(hidden_features, num_layers, num_shared_layers, omega)
    running_on = opt.set_up(threads, implementation, device)
    kind = _noise_kind(source, images, size)
    signals, skipped = (
        opt.read_signals(images, size, crop, channels, alpha, value_range, reporter) if images else ([], [])
    )
    if kind is not None:
        shape = signals[0].shape if signals else opt.parse_size(size)
        count = signals[0].channels if signals else channels or 1
        signals += noise(kind, noise_count, shape or (), channels=count, amplitude=noise_amplitude, seed=settings.seed)
    checkpoint = out.with_name(out.name + ".checkpoint")
    if out.is_dir():
        raise bad_input("--out", "a file", f"the folder {out}", "For example encoder.safetensors.")
    # Parameters, up to five more of their size by the optimiser, and the old file beside the new one.
    check_writable(out.parent, 12 * 4 * architecture.hidden_features**2 * architecture.num_layers)
    if out.exists() and not checkpoint.exists() and not overwrite:
        _check_same(Encoder.load(out), settings.as_dict(), architecture, [s.fingerprint() for s in signals], out)
        reporter.say(f"{out} is complete already; nothing to do (--overwrite begins anew)")
        reporter.emit({"out": str(out), "complete": True, "skipped": [vars(s) for s in skipped]})
        raise typer.Exit(EXIT_PARTIAL if skipped else 0)

    reporter.say(f"{len(signals)} signals of {'x'.join(map(str, signals[0].values.shape))}; {architecture}")
    reporter.say(f"running on {running_on}")
    if checkpoint.exists():
        reporter.say(f"continuing from {checkpoint}")
    with opt.process_group(device) as rank, reporter.progress("pre-training", settings.pretrain_steps) as update:

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
            distributed=rank is not None,
            on_check=show,
        )
    if opt.later_rank():
        return
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


def _noise_kind(source: str, images: list[str] | None, size: str | None) -> str | None:
    """The kind of noise that --source asks for; None for images alone."""
    wants_images = source.startswith("images")
    rest = source.removeprefix("images+")
    if source != "images" and not rest.startswith("noise:"):
        form = "images, noise:KIND or images+noise:KIND"
        raise bad_input("--source", form, repr(source), f"KIND is one of {', '.join(KINDS)}.")
    if wants_images != bool(images):
        expected = "image files or folders" if wants_images else "no images"
        raise bad_input(f"--source {source}", expected, images or "none", "Name images, or take noise alone.")
    if not wants_images and size is None:
        raise bad_input("--source", "a --size for noise", "none", "For example --size 178x178.")
    if source == "images":
        return None
    return check_choice("--source", rest.removeprefix("noise:"), KINDS)


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

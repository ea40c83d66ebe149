"""strainer-fast inspect"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from strainer_fast._checks import InputError, bad_input
from strainer_fast._files import read_metadata
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import Reporter, decibels, handled, table
from strainer_fast.fitting import FitResult
from strainer_fast.fitting.output import WEIGHTS
from strainer_fast.models import Architecture, Encoder


@handled
def inspect(
    file: Annotated[Path, typer.Argument(help="An encoder, a fit (or its folder) or an unfinished pre-training.")],
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Say what a file holds: network, how it was made, how good it is."""
    reporter = Reporter(quiet, json)
    path = file / WEIGHTS if file.is_dir() else file
    document = read_metadata(path)
    reporter.say(
        f"{path}: {document['kind']}, format {document['format_version']}, strainer_fast {document['package_version']}"
    )
    try:
        if document["kind"] == "encoder":
            _encoder(Encoder.load(path), reporter)
        elif document["kind"] == "fit":
            _fit(FitResult.load(path), reporter)
        else:
            _unfinished(document, reporter)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise bad_input(str(path), "complete metadata", f"{type(error).__name__}: {error}", "It is damaged.") from None
    reporter.emit(document)


def _unfinished(document: dict[str, Any], reporter: Reporter) -> None:
    settings = document["settings"]
    reporter.say(f"network: {Architecture(**settings['architecture'])}")
    reporter.say(f"signals: {', '.join(settings['signals'])}")
    reporter.say(f"{document['steps_done']} of {settings['recipe']['pretrain_steps']} steps done")


def _encoder(encoder: Encoder, reporter: Reporter) -> None:
    record: dict[str, Any] = encoder.record
    reporter.say(f"network: {encoder.architecture}; {encoder.in_features} coordinates")
    reporter.say(f"weights: {encoder.fingerprint()}")
    if not record:
        return
    reporter.say(f"coordinates: {record['coordinates']}")
    reporter.say(
        f"trained on {len(record['signals'])} signals of {'x'.join(map(str, record['shape']))}, {record['channels']} "
        f"channels, for {record['steps']} steps ({record['seconds']:.1f} s), recipe {record['recipe']['name']}, "
        f"stopped by {record['stop_reason']}"
    )
    rows = [
        (name, decibels(psnr) if psnr is not None else "exact" if exact else "unknown")
        for name, psnr, exact in zip(record["signals"], record["psnr"], record["exact"], strict=True)
    ]
    reporter.say(table(("signal", "PSNR dB"), rows))


def _fit(result: FitResult, reporter: Reporter) -> None:
    recipe = result.settings["recipe"]
    reporter.say(f"network: {result.architecture}; {result.in_features} coordinates")
    reporter.say(f"recipe {recipe['name']}, start {recipe['start']}, from {result.settings['init']}")
    rows = [
        (s.name, "x".join(map(str, s.shape)), str(s.channels), decibels(s.psnr), str(s.steps), s.stop_reason)
        for s in result.signals
    ]
    reporter.say(table(("name", "size", "channels", "PSNR dB", "steps", "stopped by"), rows))

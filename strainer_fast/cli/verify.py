"""strainer-fast verify and export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import EXIT_FAILED, Reporter, handled
from strainer_fast.datasets import FittedDataset
from strainer_fast.datasets import export as run_export
from strainer_fast.datasets import verify as run_verify

Folder = Annotated[Path, typer.Argument(help="Folder that fit-dataset wrote.")]
SHOWN = 10


@handled
def verify(
    folder: Folder,
    source: Annotated[Path | None, typer.Option(help="The signals, where they are not where they were.")] = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Measure the PSNR of every network of a data set again. Exit code 1: some are not what the folder says."""
    reporter = Reporter(quiet, json)
    found = run_verify(FittedDataset(folder), source)
    reporter.say(
        f"{found.checked} networks measured again: {found.same_bits} to the same bit, worst {found.worst:.2g} dB apart"
    )
    for name, stored, measured in found.wrong[:SHOWN]:
        reporter.warn(f"{name}: {measured:.4f} dB, not {stored:.4f}")
    for name in found.changed[:SHOWN]:
        reporter.warn(f"{name}: its values have changed since the fit")
    for index in found.missing[:SHOWN]:
        reporter.warn(f"signal {index} is not in the source any more")
    reporter.emit(
        {
            "checked": found.checked,
            "same_bits": found.same_bits,
            "worst_db": found.worst if found.worst < float("inf") else None,
            "wrong": len(found.wrong),
            "changed": len(found.changed),
            "missing": len(found.missing),
        }
    )
    if not found.passed:
        raise typer.Exit(EXIT_FAILED)


@handled
def export(
    folder: Folder,
    out: Annotated[Path, typer.Option(help="FILE.npz, FILE.hdf5 (fit-a-nef's layout), or a folder of state_dicts.")],
    form: Annotated[
        str | None, typer.Option("--format", help="npz, hdf5 or state_dicts; by the ending of --out.")
    ] = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Write the networks of a data set in the form of another program."""
    reporter = Reporter(quiet, json)
    dataset = FittedDataset(folder)
    path = run_export(dataset, out, form)
    reporter.say(f"{len(dataset)} networks in {path}")
    reporter.emit({"out": str(path), "networks": len(dataset)})

"""The command line: one file per verb.

Exit codes: 0 done; 1 failed (disk, internal error); 2 unusable input or options, nothing was done; 3 done, but some
inputs were skipped or diverged; 130 interrupted, what was finished is kept.
"""

import io
import sys

import typer

from strainer_fast.cli.bench import bench
from strainer_fast.cli.demo import demo
from strainer_fast.cli.doctor import doctor
from strainer_fast.cli.fit import fit
from strainer_fast.cli.fit_dataset import fit_dataset
from strainer_fast.cli.inspect import inspect
from strainer_fast.cli.pretrain import pretrain
from strainer_fast.cli.recipes import recipes
from strainer_fast.cli.render import render
from strainer_fast.cli.verify import export, verify

app = typer.Typer(
    name="strainer-fast",
    help="Turn images into implicit neural representations, fast. "
    "Exit codes: 0 done; 1 failed; 2 unusable input; 3 done, but some inputs were skipped; 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (demo, pretrain, fit, fit_dataset, verify, export, recipes, render, inspect, doctor, bench):
    app.command()(verb)


def main() -> None:
    """Entry point of the `strainer-fast` command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name must not stop the work
    app()

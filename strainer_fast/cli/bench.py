"""strainer-fast bench"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from strainer_fast._checks import bad_input
from strainer_fast._files import check_writable
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import Reporter, handled
from strainer_fast.ops import choose_device

NEEDED = ("pytest", "pytest_benchmark", "matplotlib")


@handled
def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Few cases and rounds: some minutes.")] = False,
    suite: Annotated[
        list[str] | None, typer.Option(help="layers, step, fit, dataset or render; repeat for more, all without it.")
    ] = None,
    device: opt.Device = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for bench.json, report.md and report.html.")] = Path("bench"),
    compare: Annotated[
        tuple[Path, Path] | None, typer.Option(help="Measure nothing: what changed between two runs, beyond noise.")
    ] = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Measure this package beside its peers on this machine; every provider is checked before its time counts."""
    reporter = Reporter(quiet, json)
    absent = [name for name in NEEDED if find_spec(name) is None]
    if absent:
        what = f"not installed: {', '.join(absent)}"
        raise bad_input("bench", "the packages of the extra `bench`", what, "pip install 'strainer-fast[bench]'")
    from strainer_fast.benchmarks import compare as comparing
    from strainer_fast.benchmarks import run as running

    if compare is not None:
        before, after = (running.load(path) for path in compare)
        text, changed = comparing.comparison(before, after)
        reporter.say(text)
        keys = ("suite", "case", "provider", "threads")
        reporter.emit({"changed": [{k: c.row[k] for k in keys} | {"ratio": c.corrected} for c in changed]})
        return
    suites = running.check_suites(suite or ())
    where = choose_device(device).type
    check_writable(out)
    document, right = running.run(suites, quick, where, out, quiet or json)
    reporter.say(f"wrote {out / running.JSON}, {running.MARKDOWN} and {running.PAGE} in {document['seconds']:.0f} s")
    reporter.say(f"next: open {out / running.PAGE}")
    reporter.emit({"out": str(out), "rows": len(document["rows"]), "right": right})
    if not right:
        raise typer.Exit(1)

"""Puts a run where people look: committed rows, tables between markers, plots.

    python -m strainer_fast.benchmarks.publish bench/bench.json

keeps the run as benchmarks/results/cpu.json (gpu.json of a GPU), writes tables between `<!-- NAME table: begin -->` and
`<!-- NAME table: end -->` in PAGES, and a light and a dark SVG of every plot to docs/plots.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from strainer_fast._files import atomic_writer
from strainer_fast.benchmarks.plots import THEMES, plots, svg
from strainer_fast.benchmarks.run import load
from strainer_fast.benchmarks.tables import SUITES, replace_between, suite_table, table, where

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/native.md", "docs/speed.md")
TABLES = {**{suite: (suite, None) for suite in SUITES}, "step": ("step", "step"), "sizes": ("step", "sizes")}
"""Name between markers -> suite, and which of its tables."""


def marked(name: str, document: dict[str, Any]) -> str:
    """A table with the machine's line above it; empty where the run has no such rows."""
    suite, only = TABLES[name]
    headings, cells = suite_table(suite, document["rows"], only)
    return f"{where(document)}\n\n{table(headings, cells)}" if cells else ""


def updated(text: str, document: dict[str, Any]) -> str:
    """The page with every table that it has markers of anew."""
    for name in TABLES:
        if found := marked(name, document):
            text = replace_between(text, f"{name} table", [found])
    return text


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_writer(path) as file:
        file.write(text.encode())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m strainer_fast.benchmarks.publish", description=__doc__)
    parser.add_argument("run", type=Path, help="bench.json of `strainer-fast bench`, or its folder")
    document = load(parser.parse_args().run)
    kept = ROOT / "benchmarks" / "results" / f"{'cpu' if document['device'] == 'cpu' else 'gpu'}.json"
    _write(kept, json.dumps(document, indent=None, separators=(",", ":")).replace('{"suite"', '\n{"suite"') + "\n")
    if document["device"] == "cpu":
        for name in PAGES:
            path = ROOT / name
            _write(path, updated(path.read_text(), document))
        for plot in plots(document):
            for theme in THEMES:
                _write(ROOT / "docs" / "plots" / f"{plot.name}-{theme}.svg", svg(plot, theme))
    print(f"wrote {kept.relative_to(ROOT)}, tables in {', '.join(PAGES)}, docs/plots")


if __name__ == "__main__":
    main()

"""The HTML page of a run: one file, no network, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from typing import Any

from strainer_fast.benchmarks.kernels_side import PRECISIONS, STEP, measured_us
from strainer_fast.benchmarks.plots import plots, svg
from strainer_fast.benchmarks.tables import SUITES, TITLES, number, suite_table, where

STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --back: #ffffff; --line: #d8dee4; --soft: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --text: #e6edf3; --back: #0d1117; --line: #3d444d; --soft: #161b22; } }
body { margin: 0 auto; padding: 1rem; max-width: 68rem; font: 16px/1.5 system-ui, sans-serif; color: var(--text);
  background: var(--back); }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
figure { margin: 1rem 0; } figcaption { font-weight: 600; }
svg { width: 100%; height: auto; max-width: 34rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap; }
tr.ours td { font-weight: 600; background: var(--soft); }
.dark { display: none; }
@media (prefers-color-scheme: dark) { .light { display: none; } .dark { display: block; } }
"""


def html_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Escaped; a provider in bold marks a row of ours."""
    head = "".join(f"<th>{escape(h)}</th>" for h in headings)
    lines = []
    for row in rows:
        ours = any(cell.startswith("**") for cell in row)
        cells = "".join(f"<td>{escape(cell.strip('*'))}</td>" for cell in row)
        lines.append(f"<tr{' class=ours' if ours else ''}>{cells}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def page(document: dict[str, Any]) -> str:
    """The whole page."""
    parts = [f"<p>{escape(where(document))}</p>", "<p>Every provider is compared with float64 before its time counts."
             " Rows where this package is slower stand there like the others.</p>"]  # fmt: skip
    if find_spec("matplotlib") is not None:
        figures = [
            f"<figure><figcaption>{escape(plot.claim)}</figcaption>"
            + "".join(f'<div class="{theme}">{svg(plot, theme)}</div>' for theme in ("light", "dark"))
            + "</figure>"
            for plot in plots(document)
        ]
        parts.append(f'<div class="plots">{"".join(figures)}</div>')
    else:
        parts.append("<p>No plots: matplotlib is not installed (extra <code>bench</code>).</p>")
    for suite in SUITES:
        headings, cells = suite_table(suite, document["rows"])
        if cells:
            parts.append(f"<h2>{escape(TITLES[suite])}</h2>{html_table(headings, cells)}")
    parts.append(_kernels(document))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>strainer_fast benchmarks</title><style>{STYLE}</style></head>"
        f"<body><h1>strainer_fast benchmarks</h1>{''.join(parts)}</body></html>\n"
    )


def _kernels(document: dict[str, Any]) -> str:
    found = document.get("kernels") or {"missing": "not asked for"}
    heading = "<h2>GPU kernels</h2>"
    if "missing" in found:
        return f"{heading}<p>No report: {escape(found['missing'])}.</p>"
    parts = [heading, "<p>Compiled without a GPU (<code>python -m strainer_fast.kernels.aot</code>) and modelled "
             "(<code>roofline.py</code>); nothing in these columns is a time that was measured. Measured columns are "
             "empty until <code>make bench-gpu</code> has run on that chip.</p>"]  # fmt: skip
    for chip, launches in found["predicted"].items():
        rows, total = [], 0.0
        for i, launch in enumerate(launches):
            time, predicted = measured_us(document, chip, i), launch["predicted_us"]
            total += predicted
            ratio = "" if time is None else f"{time / predicted:.2f}"
            cell = "" if time is None else number(time)
            rows.append([launch["kernel"], number(predicted), launch["bound"], cell, ratio])
        rows.append(["sum", number(total), "", "", ""])
        headings = ["kernel", "predicted us", "bound by", "measured us", "measured / predicted"]
        parts.append(f"<h3>A step of {STEP} on {escape(chip)}, {PRECISIONS[0]}</h3>{html_table(headings, rows)}")
    columns = ("registers", "spilled", "shared", "blocks")
    rows = [
        [
            *(kernel["chip"], kernel["kernel"], kernel["precision"], ", ".join(kernel["cases"])),
            *([str(kernel["report"][c]) for c in columns] if kernel["report"] else ["", "", "", kernel["error"]]),
        ]
        for kernel in found["compiled"]
    ]
    headings = ["chip", "kernel", "precision", "cases", *columns]
    parts.append(f"<h3>What they take</h3>{html_table(headings, rows)}")
    return "".join(parts)

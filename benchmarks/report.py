"""Tables from result files.

python -m strainer_fast.benchmarks.report benchmarks/results/cpu.json                       # Markdown to stdout
python -m strainer_fast.benchmarks.report benchmarks/results/cpu.json --update README.md    # between the markers in files
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

SUITES = ("step", "sizes", "fits")
"""Tables; each stands between `<!-- NAME table: begin -->` and `<!-- NAME table: end -->` wherever it is wanted."""


def rows_alone(result: dict[str, Any]) -> dict[str, Any]:
    """What tables are made of: machine and rows of each case."""
    return {"benchmarks": [{"extra_info": benchmark["extra_info"]} for benchmark in result["benchmarks"]]}


def markdown(result: dict[str, Any], suite: str) -> str:
    """One table, the faster first in each case; slower ones of ours are printed like the others."""
    benchmarks = [b for b in result["benchmarks"] if b["extra_info"].get("suite", "step") == suite]
    if not benchmarks:
        return ""
    machine = benchmarks[0]["extra_info"]["machine"]
    what = "fits of whole signals" if suite == "fits" else "a step is forward, loss and backward"
    lines = [
        f"{machine['cpu']}, torch {machine['torch']}, Python {machine['python']}, commit {machine['commit']}, "
        f"{machine['date']}; strainer_fast is its {machine['engine']} engine. Medians of interleaved rounds; {what}.",
        "",
        *(_fit_rows(benchmarks) if suite == "fits" else _step_rows(benchmarks)),
    ]
    return "\n".join(lines)


def _name(row: dict[str, Any]) -> str:
    return f"**{row['provider']}**" if row["provider"] == "strainer_fast" else str(row["provider"])


def _step_rows(benchmarks: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | provider | threads | ms (p20 to p80) | against ours | GFLOP/s | share of sgemm | peak memory MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for benchmark in benchmarks:
        rows = benchmark["extra_info"]["rows"]
        ours = next(r["median_ms"] for r in rows if r["provider"] == "strainer_fast")
        for r in sorted(rows, key=lambda r: r["median_ms"]):
            memory = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
            spread = f"{r['median_ms']:.1f} ({r['p20_ms']:.1f} to {r['p80_ms']:.1f})"
            lines.append(
                f"| {r['case']} | {_name(r)} | {r['threads']} | {spread} | "
                f"{r['median_ms'] / ours:.2f} | {r['gflops']:.0f} | {100 * r['sgemm_share']:.0f} % | {memory} |"
            )
    return lines


def _fit_rows(benchmarks: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| case | provider | threads | fits per second (lowest to highest) | ours against it |",
        "|---|---|---|---|---|",
    ]
    for benchmark in benchmarks:
        rows = benchmark["extra_info"]["rows"]
        ours = next(r["fits_per_s"] for r in rows if r["provider"] == "strainer_fast")
        for r in sorted(rows, key=lambda r: -r["fits_per_s"]):
            spread = f"{r['fits_per_s']:.2f} ({r['lowest']:.2f} to {r['highest']:.2f})"
            ratio = f"{ours / r['fits_per_s']:.1f}"
            lines.append(f"| {r['case']} | {_name(r)} | {r['threads']} | {spread} | {ratio} |")
    return lines


def update(path: Path, result: dict[str, Any]) -> None:
    """Replace what stands between the markers of each table that the file has."""
    text = path.read_text()
    for suite in SUITES:
        begin, end = f"<!-- {suite} table: begin -->", f"<!-- {suite} table: end -->"
        table = markdown(result, suite)
        if begin in text and table:
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    path.write_text(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Tables from benchmark results.")
    parser.add_argument("result", type=Path, help="JSON file of `make bench`")
    parser.add_argument("--update", type=Path, nargs="+", help="Markdown files with markers")
    parser.add_argument("--keep", type=Path, help="file for the rows alone, without the host's details")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    if arguments.keep is not None:
        arguments.keep.write_text(json.dumps(rows_alone(result), indent=1) + "\n")
    elif arguments.update is not None:
        for path in arguments.update:
            update(path, result)
    else:
        print("\n\n".join(table for suite in SUITES if (table := markdown(result, suite))))


if __name__ == "__main__":
    main()

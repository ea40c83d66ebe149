"""Tables from result files.

python -m benchmarks.report benchmarks/results/cpu.json                       # Markdown to stdout
python -m benchmarks.report benchmarks/results/cpu.json --update README.md    # between the markers in a file
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- speed table: begin -->", "<!-- speed table: end -->"


def rows_alone(result: dict[str, Any]) -> dict[str, Any]:
    """What tables are made of: machine and rows of each case."""
    return {"benchmarks": [{"extra_info": benchmark["extra_info"]} for benchmark in result["benchmarks"]]}


def markdown(result: dict[str, Any]) -> str:
    """One table, the faster first in each case; slower ones of ours are printed like the others."""
    machine = result["benchmarks"][0]["extra_info"]["machine"]
    lines = [
        f"{machine['cpu']}, torch {machine['torch']}, Python {machine['python']}, commit {machine['commit']}, "
        f"{machine['date']}. Medians of interleaved rounds; a step is forward, loss and backward.",
        "",
        "| case | provider | threads | ms (p20 to p80) | against ours | GFLOP/s | share of sgemm | peak memory MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for benchmark in result["benchmarks"]:
        rows = benchmark["extra_info"]["rows"]
        ours = next(r["median_ms"] for r in rows if r["provider"] == "strainer_fast")
        for r in sorted(rows, key=lambda r: r["median_ms"]):
            memory = "" if r["peak_mb"] is None else f"{r['peak_mb']:.0f}"
            name = f"**{r['provider']}**" if r["provider"] == "strainer_fast" else r["provider"]
            spread = f"{r['median_ms']:.1f} ({r['p20_ms']:.1f} to {r['p80_ms']:.1f})"
            lines.append(
                f"| {r['case']} | {name} | {r['threads']} | {spread} | "
                f"{r['median_ms'] / ours:.2f} | {r['gflops']:.0f} | {100 * r['sgemm_share']:.0f} % | {memory} |"
            )
    return "\n".join(lines)


def update(path: Path, table: str) -> None:
    """Replace what stands between the markers."""
    text = path.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Tables from benchmark results.")
    parser.add_argument("result", type=Path, help="JSON file of `make bench`")
    parser.add_argument("--update", type=Path, help="Markdown file with the markers")
    parser.add_argument("--keep", type=Path, help="file for the rows alone, without the host's details")
    arguments = parser.parse_args()
    result = json.loads(arguments.result.read_text())
    if arguments.keep is not None:
        arguments.keep.write_text(json.dumps(rows_alone(result), indent=1) + "\n")
    elif arguments.update is not None:
        update(arguments.update, markdown(result))
    else:
        print(markdown(result))


if __name__ == "__main__":
    main()

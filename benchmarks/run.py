"""Runs the suites, each in a process of its own, and writes what they found: JSON, Markdown, an HTML page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from strainer_fast._checks import bad_input
from strainer_fast._files import atomic_writer
from strainer_fast.benchmarks.harness import machine
from strainer_fast.benchmarks.kernels_side import kernels_side
from strainer_fast.benchmarks.page import page
from strainer_fast.benchmarks.tables import SUITES, markdown

FORMAT = 1
FOLDER = Path(__file__).resolve().parent
JSON, MARKDOWN, PAGE = "bench.json", "report.md", "report.html"
FINISHED = (0, 1, 5)
"""pytest's exit codes of a whole run: all right, a provider was wrong, nothing to run."""


def run(suites: Sequence[str], quick: bool, device: str, out: Path, quiet: bool = False) -> tuple[dict[str, Any], bool]:
    """Measure, and write the three files into `out`; rows are on the disk as soon as they are known.

    Args:
        suites: some of tables.SUITES.
        quick: a minute or two a suite, with fewer cases and rounds.
        device: "cpu" or "cuda".
        quiet: no line for every row on stderr.

    Returns:
        The document, and whether every provider that could run was right.

    Raises RuntimeError, after all is written, if a suite ended before its end.
    """
    rows_path = out / "rows.jsonl"
    rows_path.unlink(missing_ok=True)
    began, codes = time.time(), dict[str, int]()
    kernels: dict[str, Any] = {"missing": "the run was stopped before"}
    try:
        for suite in suites:
            codes[suite] = _measure(suite, quick, device, out, quiet)
        kernels = kernels_side(quick, device, out)
    finally:  # also when it is stopped: what was measured is worth a report
        rows = [json.loads(line) for line in rows_path.read_text().splitlines()] if rows_path.exists() else []
        document = {
            "format": FORMAT,
            "machine": machine(device),
            "quick": quick,
            "device": device,
            "seconds": time.time() - began,
            "rows": rows,
            "kernels": kernels,
        }
        write(document, out)
    broken = [f"{suite} (code {code}: see {out / suite}.log)" for suite, code in codes.items() if code not in FINISHED]
    if broken:
        raise RuntimeError(f"suites that did not come to their end: {', '.join(broken)}")
    return document, 1 not in codes.values()


def _measure(suite: str, quick: bool, device: str, out: Path, quiet: bool) -> int:
    """One suite in a process of its own; pytest's exit code."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-W", "ignore", "-p", "no:cacheprovider"]
    command += ["-p", "strainer_fast.benchmarks.plugin", "-c", os.devnull, "--rootdir", str(FOLDER)]
    command += ["--rows", str(out / "rows.jsonl"), "--on", device, "--benchmark-json", str(out / f"{suite}.json")]
    command += ["--short"] * quick + [str(FOLDER / f"bench_{suite}.py")]
    with (out / f"{suite}.log").open("w") as file:
        return subprocess.run(command, stdout=file, stderr=file if quiet else None, check=False).returncode


def write(document: dict[str, Any], out: Path) -> None:
    """The three files, each whole or not at all."""
    for name, text in (
        (JSON, json.dumps(document, indent=1, allow_nan=False)),
        (MARKDOWN, markdown(document)),
        (PAGE, page(document)),
    ):
        with atomic_writer(out / name) as file:
            file.write(text.encode())


def load(path: Path) -> dict[str, Any]:
    """A document that `run` wrote.

    Raises InputError for a file that is missing or another.
    """
    try:
        document = json.loads((path / JSON if path.is_dir() else path).read_text())
        if document["format"] == FORMAT and all({"suite", "case", "provider"} <= set(r) for r in document["rows"]):
            found: dict[str, Any] = document
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise bad_input(str(path), f"a {JSON} of `strainer-fast bench`", "another or no file", "Check the path.")


def check_suites(names: Sequence[str]) -> tuple[str, ...]:
    """All of them for none."""
    unknown = [name for name in names if name not in SUITES]
    if unknown:
        raise bad_input("--suite", f"some of {', '.join(SUITES)}", ", ".join(unknown), "Repeat --suite for more.")
    return tuple(name for name in SUITES if name in names) or SUITES

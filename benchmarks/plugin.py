"""pytest's side of the suites: where they run, and rows that are on the disk as soon as they are known."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from strainer_fast.benchmarks.harness import OURS, Record, Row
from strainer_fast.benchmarks.tables import spread


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of a run; `strainer-fast bench` sets them."""
    group = parser.getgroup("strainer_fast")
    group.addoption("--on", default="cpu", choices=("cpu", "cuda"), help="device that the suites run on")
    group.addoption("--rows", type=Path, help="file that a line of JSON is appended to for every row")
    group.addoption("--short", action="store_true", help="only cases of --quick, fewer rounds")


def pytest_configure(config: pytest.Config) -> None:
    """The mark that cases of --quick have."""
    config.addinivalue_line("markers", "quick: part of `strainer-fast bench --quick`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not part of a quick run."""
    if config.getoption("--short"):
        items[:] = [item for item in items if item.get_closest_marker("quick")]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    """ "cpu" or "cuda"."""
    chosen: str = request.config.getoption("--on")
    return chosen


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    """Whether time is short."""
    return bool(request.config.getoption("--short"))


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Record:
    """Appends a row to the file and says it on stderr."""
    path: Path | None = request.config.getoption("--rows")

    def keep(row: Row) -> None:
        if path is not None:
            with path.open("a") as file:
                file.write(json.dumps(row, allow_nan=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        what = row.get("refused") or row.get("not_run") or spread(row)
        star = "*" if row["provider"] == OURS else " "
        print(f"{star} {row['suite']:7} {row['case']}: {row['provider']}: {what}", file=sys.stderr, flush=True)

    return keep

"""Rows of first light: each on the disk as soon as it is known, failures with what they said."""

from __future__ import annotations

import json
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Row = dict[str, Any]

TEXT, TRACE_LINES = 800, 6
"""Characters of an exception's text, and lines of its traceback, that a row keeps."""


@dataclass
class Log:
    """Appends rows to a file; several processes may share it.

    Args:
        path: of rows.jsonl.
        stage: its number.
        seconds: what the stage may take; `late` says when there is no use in beginning something else.
    """

    path: Path
    stage: int
    seconds: float = math.inf
    begin: float = field(default_factory=time.monotonic)

    def row(self, **found: Any) -> None:
        """Keep one, and show it."""
        text = json.dumps({"stage": self.stage, "at_s": round(time.monotonic() - self.begin, 1), **_finite(found)})
        with self.path.open("a") as file:  # one write: lines of other processes stay whole
            file.write(text + "\n")
        print(text, flush=True)

    def left(self) -> float:
        """Seconds until the stage has to be over."""
        return self.seconds - (time.monotonic() - self.begin)

    @contextmanager
    def attempt(self, **about: Any) -> Iterator[None]:
        """Within, what fails becomes a row, and the next one has its turn."""
        begin = time.monotonic()
        try:
            yield
        except Exception as error:
            trace = traceback.format_exc().strip().splitlines()[-TRACE_LINES:]
            text = f"{type(error).__name__}: {error}"[:TEXT]
            self.row(**about, failed=text, trace=trace, took_s=round(time.monotonic() - begin, 2))

    def each(self, items: Sequence[tuple[Mapping[str, Any], Callable[[], object]]]) -> None:
        """Do them in turn as long as there is time; those that are left are a row."""
        for number, (about, run) in enumerate(items):
            if self.left() < 1:
                self.row(left_out=[" ".join(map(str, a.values())) for a, _ in items[number:]])
                return
            with self.attempt(**about):
                run()


def _finite(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def read(path: Path) -> list[Row]:
    """All rows; a line that a killed process left unfinished is left out.

    Raises FileNotFoundError.
    """
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows

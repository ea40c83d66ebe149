"""What a verb says, and where: bars on a terminal, plain lines in a pipe, JSON for machines, or nothing."""

from __future__ import annotations

import functools
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ParamSpec, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from strainer_fast._checks import InputError
from strainer_fast.fitting import Interrupted

EXIT_FAILED, EXIT_USAGE, EXIT_PARTIAL, EXIT_INTERRUPTED = 1, 2, 3, 130
PLAIN_SECONDS = 10.0
"""Least time between two lines of progress in a pipe."""

P = ParamSpec("P")


class Reporter:
    """Says things to a person, unless quiet; with as_json, to stderr, because stdout belongs to the machine."""

    def __init__(self, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet, self.as_json = quiet, as_json
        self.console = Console(stderr=as_json, quiet=quiet, markup=False, highlight=False, soft_wrap=True)
        warnings.showwarning = self._show_warning

    def say(self, text: str) -> None:
        """A line of output."""
        self.console.print(text)

    def warn(self, text: str) -> None:
        """A line to stderr, even when quiet."""
        print(f"warning: {text}", file=sys.stderr)

    def emit(self, data: Any) -> None:
        """The verb's result for machines, with --json only: one JSON object on stdout."""
        if self.as_json:
            print(json.dumps(data, allow_nan=False))

    @contextmanager
    def progress(self, label: str, total: int, unit: str = "steps") -> Iterator[Callable[[int, str], None]]:
        """Yields update(done, note); a bar on a terminal, a line now and then elsewhere."""
        if self.console.is_terminal and not self.quiet:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[note]}"),
                TimeRemainingColumn(),
            )
            with Bar(*columns, console=self.console) as bar:
                task = bar.add_task(label, total=total or None, note="")
                yield lambda done, note: bar.update(task, completed=done, note=note)
            return
        begin = last = time.monotonic()

        def update(done: int, note: str) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last < PLAIN_SECONDS or not done:
                return
            if done < total:
                left = (now - begin) * (total - done) / done
                self.say(f"{label}: {done}/{total}  {note}  {left:.0f} s left")
                last = now
            elif not total:  # only the end will tell
                self.say(f"{label}: {done}  {note}")
                last = now

        self.say(f"{label}: {total or ''} {unit}".replace("  ", " "))
        yield update

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        self.warn(str(message))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def decibels(psnr: float) -> str:
    """A PSNR for people."""
    return "exact" if psnr == float("inf") else f"{psnr:.2f}"


def handled(verb: Callable[P, None]) -> Callable[P, None]:
    """Turn what can go wrong into a message and an exit code."""

    @functools.wraps(verb)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except InputError as error:
            _fail(str(error), EXIT_USAGE)
        except Interrupted as error:
            _fail(str(error), EXIT_INTERRUPTED)
        except KeyboardInterrupt:
            _fail("interrupted", EXIT_INTERRUPTED)
        except OSError as error:
            _fail(str(error), EXIT_FAILED)

    return wrapper


def _fail(message: str, code: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(code)

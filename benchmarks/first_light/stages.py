"""The stages of first light, each in a process of its own: python -m ... stages NUMBER --out DIRECTORY --until TIME."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from strainer_fast.benchmarks.first_light.rows import Log


@dataclass(frozen=True)
class Run:
    """What a stage is told.

    Args:
        log: where its rows go.
        out: a folder for other files.
        small: whether this is a rehearsal, with sizes for a CPU.
        part, parts: which share of the work is this process's.
    """

    log: Log
    out: Path
    small: bool
    part: int = 0
    parts: int = 1


def watch_compiler(log: Log) -> Callable[[], None]:
    """Collect what Triton compiles; what is returned keeps it as a row: kernels, seconds, hits of the cache."""
    found: list[tuple[str, float, bool]] = []

    def keep() -> None:
        slow = sorted((f for f in found if not f[2]), key=lambda f: -f[1])
        log.row(
            what="compiled",
            kernels=len(slow),
            seconds=round(sum(s for _, s, _ in slow), 1),
            from_cache=len(found) - len(slow),
            slowest=[f"{name} {s:.1f} s" for name, s, _ in slow[:5]],
        )

    try:
        from triton import knobs

        def heard(*, src: object, times: object, cache_hit: bool, **_: object) -> None:
            found.append((str(getattr(src, "name", src)), getattr(times, "total", 0) * 1e-6, cache_hit))

        knobs.compilation.listener = heard
    except (ImportError, AttributeError):  # older Triton has no such thing
        return lambda: None
    return keep


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    from strainer_fast.benchmarks.first_light import first, fitting, last, steps

    stages: dict[int, Callable[[Run], None]] = {
        1: first.environment,
        2: first.equality,
        3: fitting.against_the_cpu,
        4: steps.steps,
        5: fitting.time_to_psnr,
        6: fitting.fits_per_second,
        7: last.rendering,
        8: last.profiles,
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", type=int, choices=sorted(stages))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--until", type=float, required=True, help="time.monotonic() at which it has to be over")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--part", default="0/1", metavar="I/N")
    options = parser.parse_args(arguments)
    part, parts = map(int, options.part.split("/"))
    log = Log(options.out / "rows.jsonl", options.stage, options.until - time.monotonic())
    compiled = watch_compiler(log)
    with log.attempt(what="stage"):
        stages[options.stage](Run(log, options.out, options.small, part, parts))
    compiled()
    return 0


if __name__ == "__main__":
    sys.exit(main())

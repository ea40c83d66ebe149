"""strainer-fast demo"""

from __future__ import annotations

import json as jsonlib
import time
from pathlib import Path
from typing import Annotated

import typer

from strainer_fast import demo as work
from strainer_fast._files import atomic_writer, check_writable
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import Reporter, handled, table


@handled
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture, the numbers and the encoder.")] = Path("demo"),
    seed: opt.Seed = None,
    implementation: opt.Implementation = "auto",
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Learn an encoder from ten brain scans, fit four of another person, compare with a random SIREN."""
    reporter = Reporter(quiet, json)
    work.require_matplotlib()
    running_on = opt.set_up(threads, implementation, device)
    check_writable(out, 2**23)
    begin = time.perf_counter()
    steps = work.PRETRAIN_STEPS + work.FAST_PRETRAIN_STEPS
    reporter.say(
        f"Brain scans of {work.SIZE}x{work.SIZE}: pre-training on 10 scans of one head ({work.PRETRAIN_STEPS} "
        f"steps for STRAINER\nas in the paper, {work.FAST_PRETRAIN_STEPS} for recipe `fast`), then {work.STEPS} steps "
        f"for each of {len(work.TEST_IMAGES)} scans of another head. Network 6 layers of width 256."
    )
    reporter.say(f"running on {running_on}\n")
    fits = len(work.TEST_IMAGES) * len(work.METHODS)
    with reporter.progress("1/2 pre-training", steps) as on_pretrain:
        encoders = work.learn(seed or 0, implementation, device, on_pretrain)
    with reporter.progress("2/2 fitting", fits * work.STEPS) as on_fit:
        result = work.compare(encoders, seed or 0, implementation, device, on_fit)

    psnr, seconds = work.tables(result)
    reporter.say(f"\nmean over {len(result.test)} unseen scans\n{table(psnr[0], psnr[1:])}\n")
    reporter.say(f"median over the scans, start included\n{table(seconds[0], seconds[1:])}\n")
    took = " and ".join(f"{e.record['seconds']:.0f} s ({name})" for name, e in encoders.items())
    reporter.say(f"pre-training took {took}, once for all scans to come")
    picture = out / "strainer.png"
    work.draw(result, picture)
    encoders["fast"].save(out / "encoder.safetensors")
    numbers = result.as_dict()
    with atomic_writer(out / "demo.json") as file:
        file.write(jsonlib.dumps(numbers, indent=1).encode())
    reporter.say(f"wrote {picture}, demo.json and encoder.safetensors in {time.perf_counter() - begin:.0f} s")
    reporter.say(f"next: open {picture}; then try your own images:")
    reporter.say("  strainer-fast pretrain FOLDER --size 128 --crop --out encoder.safetensors")
    reporter.emit(numbers | {"picture": str(picture)})

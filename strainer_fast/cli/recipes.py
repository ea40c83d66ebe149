"""strainer-fast recipes"""

from __future__ import annotations

from typing import Annotated

import typer

from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import Reporter, handled, table
from strainer_fast.fitting import PRESETS, recipe
from strainer_fast.fitting.presets import PURPOSES, REASONS


@handled
def recipes(
    name: Annotated[str | None, typer.Argument(help="One preset, with every field.")] = None,
    quiet: opt.Quiet = False,
    json: opt.Json = False,
) -> None:
    """Say what each recipe is for, what it changes of the paper's, and the measurement behind each choice."""
    reporter = Reporter(quiet, json)
    paper = PRESETS["paper"].as_dict()
    if name is not None:
        chosen = recipe(name).as_dict()
        reporter.say(f"{name}: {PURPOSES[name]}\n")
        reporter.say(table(("field", "value", "paper"), [(f, str(v), str(paper[f])) for f, v in chosen.items()]))
        reporter.emit(chosen)
        return
    for preset, settings in PRESETS.items():
        reporter.say(f"{preset}: {PURPOSES[preset]}")
        reasons = REASONS.get(preset, {})
        for field, value in settings.as_dict().items():
            if value != paper[field] and field != "name":
                reason, row = reasons.get(field, ("", ""))
                reporter.say(f"  {field} = {value}".ljust(40) + reason + (f" [{row}]" if row else ""))
        reporter.say("")
    reporter.say("Rows are in benchmarks/results/psnr-search.jsonl; docs/recipes.md has the commands that made them.")
    reporter.say("Any field can be changed: strainer-fast fit ... --recipe fast --set freeze=0")
    reporter.emit({preset: settings.as_dict() for preset, settings in PRESETS.items()})

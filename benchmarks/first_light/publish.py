"""Rows of first light into docs/gpu.md, a plot beside it, and a list of what docs may now call measured.

    python -m strainer_fast.benchmarks.first_light.publish ROWS.jsonl [--page FILE]

keeps the rows as benchmarks/results/first-light.jsonl, replaces what stands between `<!-- first light: begin -->` and
`<!-- first light: end -->`, and draws docs/plots/gpu-steps-*.svg where matplotlib is. Rows of a rehearsal go to another
page only, for its times mean nothing.
"""

from __future__ import annotations

import argparse
import io
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from strainer_fast._checks import InputError, bad_input
from strainer_fast._files import atomic_writer
from strainer_fast.benchmarks.first_light.rows import Row, read
from strainer_fast.benchmarks.first_light.summary import number, of
from strainer_fast.benchmarks.harness import OURS
from strainer_fast.benchmarks.tables import named_provider, replace_between, spread, table

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "gpu.md"
KEPT = ROOT / "benchmarks" / "results" / "first-light.jsonl"
NAME = "first light"

UNMEASURED = re.compile(
    r"never ran on a GPU|not (yet )?run on a GPU|No (figure|number) .*GPU|never measured|unmeasured|want of (a )?GPU"
    r"|has not run on a GPU|nothing .* measured on a GPU",
    re.IGNORECASE,
)
"""What docs say of what was not measured."""

COLOURS = {"light": ("#1f2328", "#b3261e", "#3b6ea5"), "dark": ("#e6edf3", "#ff8a80", "#79b8ff")}
"""Of text, ours and others."""


def sections(rows: Sequence[Row]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, headings and cells of every table that there are rows of."""
    found = [
        (
            "Equality with float64",
            ["what", "precision", "worst error of its bound", "right"],
            _equality(of(rows, "equality")),
        ),
        (
            "A training step",
            ["case", "provider", "precision", "us (p20 to p80)", "TFLOP/s"],
            [[r["case"], named_provider(r), r["precision"], spread(r, 1e3), _rate(r)] for r in _last(of(rows, "step"))],
        ),
        (
            "A step of a whole fit, 178x178, the host included",
            ["recipe", "us"],
            [[r["recipe"], number(r["us_a_step"])] for r in of(rows, "recipe")],
        ),
        (
            "The launches of a step, measured beside predicted",
            ["case", "kernel", "us", "predicted us", "measured / predicted"],
            [line for r in of(rows, "launches") for line in _launches(r)],
        ),
        (
            "One scan of 178x178 to a PSNR",
            ["recipe", "from", "dB", "seconds", "steps", "ended at dB", "because of"],
            [[r["recipe"], r["init"], number(r["target"]), number(r["seconds"]), str(r["steps"]), number(r["psnr"]),
              r["stopped"]] for r in of(rows, "to PSNR")],
        ),
        (
            "Small networks on photographs of 28x28",
            ["networks", "recipe", "fits/s", "median dB", "seconds"],
            [[f"{r['count']} of 3x{r['width']}", r["name"], number(r["fits_per_s"]), number(r["psnr"]),
              number(r["seconds"])] for r in of(rows, "fits")],
        ),
        (
            "Values at points, 5x256",
            ["precision", "points", "us", "largest difference"],
            [[r["precision"], str(r["points"]), number(r["us"]), number(r["most_off"], 2)] for r in of(rows, "values")],
        ),
        (
            "PSNR beside the CPU's after the same steps",
            ["recipe", "where", "dB", "the CPU's dB"],
            [[r["recipe"], r["where"], f"{r['psnr']:.3f}", f"{r['cpu']:.3f}"] for r in of(rows, "beside the CPU")],
        ),
    ]  # fmt: skip
    return [section for section in found if section[2]]


def _equality(rows: Sequence[Row]) -> list[list[str]]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((str(row["of"]), row["precision"]), []).append(row)
    lines = []
    for (what, precision), members in groups.items():
        worst = max(members, key=lambda r: r.get("error") or 0.0)
        right = sum(bool(r["right"]) for r in members)
        error = f"{number(worst.get('error'), 2)} of {number(worst.get('bound'), 2)}"
        lines.append([what, precision, error, f"{right} of {len(members)}"])
    return lines


def _last(rows: Sequence[Row]) -> list[Row]:
    """Of a stage that was repeated, the last measurement of each."""
    return list({(r["case"], r["provider"], r["precision"]): r for r in rows}.values())


def _rate(row: Row) -> str:
    return number(row["flops"] / row["median_ms"] / 1e9, 3) if "median_ms" in row else str(row.get("refused", "-"))


def _launches(row: Row) -> list[list[str]]:
    lines = []
    for kernel in [*row.get("kernels", ()), {"kernel": "all", **row}]:
        if "median_ms" in kernel:
            predicted = kernel.get("predicted_ms")
            ratio = f"{kernel['median_ms'] / predicted:.2f}" if predicted else "-"
            lines.append([row["case"], kernel["kernel"], number(1e3 * kernel["median_ms"], 3),
                          number(1e3 * predicted, 3) if predicted else "-", ratio])  # fmt: skip
    return lines


def where(row: Row) -> str:
    """The machine's line."""
    versions = f"torch {row['torch']}, triton {row['triton']}, CUDA {row.get('cuda')}, driver {row.get('driver', '?')}"
    return (
        f"Measured on {row['gpu']} ({row['processors']} processors), {versions}, {row['date']}, commit {row['commit']}."
    )


def page(rows: Sequence[Row]) -> list[str]:
    """What stands between the markers.

    Raises InputError for rows that do not say where they come from.
    """
    environments = of(rows, "environment")
    if not environments:
        raise bad_input("rows", "one of stage 1, which names the GPU", f"{len(rows)} others", "Repeat it: --stage 1.")
    tests = of(rows, "tests")
    lines = [where(environments[-1]), ""]
    if tests:
        lines += [f"tests/kernels: {sum(t['passed'] for t in tests)} passed, {sum(t['failed'] for t in tests)} failed, "
                  f"{sum(t['left_out'] for t in tests)} left out for want of time.", ""]  # fmt: skip
    for title, headings, cells in sections(rows):
        lines += [f"### {title}", "", table(headings, cells), ""]
    failed = [row for row in rows if "failed" in row]
    if failed:
        about = ("what", "case", "name", "recipe", "precision")
        cells = [[str(r["stage"]), " ".join(str(r[k]) for k in about if k in r),
                  r["failed"][:160].replace("|", "/").replace("\n", " ")] for r in failed]  # fmt: skip
        lines += ["### What failed", "", table(["stage", "what", "how"], cells), ""]
    return lines


def unmeasured(root: Path = ROOT) -> list[str]:
    """Lines of the docs that say that something was not measured: file:line: text."""
    found = []
    for path in (root / "README.md", *sorted((root / "docs").glob("*.md")), root / "benchmarks" / "README.md"):
        if path.exists():
            lines = enumerate(path.read_text().splitlines(), 1)
            found += [f"{path.relative_to(root)}:{i}: {text.strip()}" for i, text in lines if UNMEASURED.search(text)]
    return found


def steps_plot(rows: Sequence[Row], theme: str) -> bytes | None:
    """Bars: microseconds of a step of 178x178, ours and the peers'; None without matplotlib or rows."""
    steps = [r for r in _last(of(rows, "step")) if "median_ms" in r]
    steps = [r for r in steps if r["case"] == steps[0]["case"]]
    try:
        from matplotlib import rcParams
        from matplotlib.figure import Figure
    except ImportError:
        return None
    if not steps:
        return None
    text, ours, others = COLOURS[theme]
    steps.sort(key=lambda r: -r["median_ms"])
    rcParams["svg.fonttype"] = "none"
    figure = Figure(figsize=(6.4, 0.6 + 0.32 * len(steps)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([f"{r['provider']}, {r['precision']}" for r in steps], [1e3 * r["median_ms"] for r in steps],
                     color=[ours if r["provider"] == OURS else others for r in steps])  # fmt: skip
    axes.bar_label(bars, fmt="%.3g", color=text, padding=2)
    axes.set_xlabel(f"microseconds a step, {steps[0]['case']}", color=text)
    axes.tick_params(colors=text)
    for spine in axes.spines.values():
        spine.set_visible(False)
    file = io.BytesIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return file.getvalue()


def publish(rows: Sequence[Row], target: Path) -> None:
    """Write the tables into a page that has the markers.

    Raises InputError for a page without markers, and for a rehearsal's rows on the project's own page.
    """
    body = page(rows)
    if target == PAGE and "stand-in" in body[0]:
        raise bad_input("rows", "those of a GPU", "a rehearsal's, whose times mean nothing", "Name another --page.")
    text = target.read_text()
    if f"<!-- {NAME}: begin -->" not in text:
        raise bad_input("page", f"the markers of {NAME!r}", str(target), "Put them where the tables are to stand.")
    with atomic_writer(target) as file:
        file.write(replace_between(text, NAME, body).encode())


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m strainer_fast.benchmarks.first_light.publish",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", type=Path)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    try:
        rows = read(options.rows)
        publish(rows, options.page)
    except (InputError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    if options.page == PAGE:
        shutil.copyfile(options.rows, KEPT)
        for theme in COLOURS:
            drawn = steps_plot(rows, theme)
            if drawn is not None:
                (ROOT / "docs" / "plots" / f"gpu-steps-{theme}.svg").write_bytes(drawn)
    print(f"wrote {options.page}. What docs say is not measured, to be read again:")
    print("\n".join(unmeasured()) or "nothing")
    return 0


if __name__ == "__main__":
    sys.exit(main())

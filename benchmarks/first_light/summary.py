"""What one reads first: a few lines a stage, failures with what they said."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from strainer_fast.benchmarks.first_light.rows import Row

VERSIONS = ("gpu", "processors", "driver", "torch", "triton", "cuda", "python", "numpy", "commit", "date")


def of(rows: Sequence[Row], what: str) -> list[Row]:
    """Rows of a kind that did not fail, in the order of time."""
    return [row for row in rows if row.get("what") == what and "failed" not in row]


def number(value: Any, digits: int = 4) -> str:
    """As text; "-" for what is not there."""
    return f"{value:.{digits}g}" if isinstance(value, int | float) else "-"


def us(row: Row) -> str:
    """The median of a row in milliseconds, as microseconds; or why there is none."""
    return f"{number(1e3 * row['median_ms'])} us" if "median_ms" in row else f"REFUSED {row.get('refused')}"


def _environment(row: Row) -> str:
    return ", ".join(f"{name} {row[name]}" for name in VERSIONS if name in row) + f"\n{row.get('explain')}"


def _beside(r: Row) -> str:
    return f"{r['recipe']} {r['where']}: {number(r['psnr'])} dB, CPU {number(r['cpu'])} ({r['off_db']:+.3f})"


def _launches(r: Row) -> str:
    if "kernels" not in r or "median_ms" not in r:
        return f"launches, {r['case']}: {r.get('refused')}"
    predicted = f"predicted {number(1e3 * r['predicted_ms'])}" if r.get("predicted_ms") else "no prediction"
    each = ", ".join(f"{k['kernel']} {number(1e3 * k['median_ms'], 3)}" for k in r["kernels"] if "median_ms" in k)
    return f"launches, {r['case']}: {us(r)}, {predicted}: {each}"


def _to_psnr(r: Row) -> str:
    got = f"{number(r['seconds'])} s, {r['steps']} steps, {number(r['psnr'])} dB ({r['stopped']})"
    return f"{r['recipe']} from {r['init']} to {r['target']:g} dB: {got}"


def _profile(r: Row) -> str:
    step = number(1e6 * r["seconds"] / r["steps"])
    busy, launches = number(r["busy_us_a_step"]), number(r["launches_a_step"])
    return f"profile, {r['recipe']}: {step} us a step, GPU busy {busy}, {launches} launches"


def _ncu(r: Row) -> str:
    return (
        f"ncu: {r.get('not_run') or ', '.join(f'{k} {v}' for k, v in r.items() if k not in ('stage', 'what', 'at_s'))}"
    )


LINES: dict[str, Callable[[Row], str]] = {
    "peaks": lambda r: f"peaks: half {number(r['half_tflops'])} TFLOP/s, copy {number(r['copy_tb_s'])} TB/s",
    "one kernel": lambda r: f"one kernel: error {number(r['error'], 2)}",
    "beside the CPU": _beside,
    "step": lambda r: f"step, {r['case']}, {r['provider']}, {r['precision']}: {us(r)}",
    "recipe": lambda r: f"step of a fit, {r['recipe']}: {number(r['us_a_step'])} us",
    "launches": _launches,
    "to PSNR": _to_psnr,
    "fits": lambda r: (
        f"{r['count']} x 3x{r['width']}, {r['name']}: {number(r['fits_per_s'])} fits/s, {number(r['psnr'])} dB"
    ),
    "values": lambda r: f"values, {r['precision']}: {number(r['us'])} us, off by {number(r['most_off'], 2)}",
    "render": lambda r: f"render {r.get('precision', '')}: {number(r['megapixels_per_s'])} megapixels/s",
    "profile": _profile,
    "ncu": _ncu,
}


def _compiled(rows: Sequence[Row]) -> list[str]:
    found = []
    for stage in sorted({row["stage"] for row in of(rows, "compiled")}):
        own = [row for row in of(rows, "compiled") if row["stage"] == stage]
        sums = {name: sum(row[name] for row in own) for name in ("kernels", "seconds", "from_cache")}
        if any(sums.values()):
            found.append(f"stage {stage}: {sums['kernels']} kernels compiled in {sums['seconds']:.0f} s of processes, "
                         f"{sums['from_cache']} from the cache")  # fmt: skip
    return found


def summary(rows: Sequence[Row]) -> str:
    """All stages, failures last."""
    lines = ["# First light", *(_environment(row) for row in of(rows, "environment")[-1:])]
    judged = of(rows, "equality")
    wrong = [row for row in judged if not row.get("right")]
    lines.append(f"equality with float64: {len(judged) - len(wrong)} of {len(judged)} right")
    for r in wrong:
        where = " ".join(str(r[k]) for k in ("case", "precision", "of", "path") if k in r)
        lines.append(f"  WRONG {where}: {r.get('refused') or r.get('where')}, error {number(r.get('error'), 2)}")
    tests = of(rows, "tests")
    if tests:
        names = ("passed", "failed", "skipped", "left_out")
        lines.append("tests/kernels: " + ", ".join(f"{sum(t[n] for t in tests)} {n}" for n in names))
    lines += _compiled(rows)
    lines += [line(row) for what, line in LINES.items() for row in of(rows, what)]
    failed = [row for row in rows if "failed" in row]
    left = [name for row in rows if "left_out" in row and row.get("what") is None for name in row["left_out"]]
    lines.append(f"{len(failed)} failures; left out for want of time: {'; '.join(left) or 'nothing'}")
    for row in failed[:30]:
        about = " ".join(str(v) for k, v in row.items() if k not in ("at_s", "failed", "trace", "took_s"))
        lines.append(f"  FAILED in stage {about}: {row['failed'][:300]}")
    return "\n".join(lines)

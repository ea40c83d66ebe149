"""What one reads first: a few lines a stage, failures with what they said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from strainer_fast.benchmarks.first_light.rows import Row


def of(rows: Sequence[Row], what: str, **about: Any) -> list[Row]:
    """Rows of a kind that did not fail; where a stage was repeated its last ones come last."""
    return [
        r for r in rows if r.get("what") == what and "failed" not in r and all(r.get(k) == v for k, v in about.items())
    ]


def number(value: Any, digits: int = 4) -> str:
    """As text; "-" for what is not there."""
    return f"{value:.{digits}g}" if isinstance(value, int | float) else "-"


def summary(rows: Sequence[Row]) -> str:
    """All stages, failures last."""
    lines = ["# First light"]
    for row in of(rows, "environment")[-1:]:
        names = ("gpu", "processors", "driver", "torch", "triton", "cuda", "python", "numpy", "commit", "date")
        lines += [", ".join(f"{n} {row[n]}" for n in names if n in row), str(row.get("explain"))]
    lines += [
        f"peaks: half {number(r['half_tflops'])} TFLOP/s, copy {number(r['copy_tb_s'])} TB/s" for r in of(rows, "peaks")
    ]
    lines += [f"one kernel: error {number(r['error'], 2)}" for r in of(rows, "one kernel")]
    judged = of(rows, "equality")
    wrong = [r for r in judged if not r.get("right")]
    lines.append(f"equality with float64: {len(judged) - len(wrong)} of {len(judged)} right")
    lines += [
        f"  WRONG {r['case']} {r['precision']} {r.get('of')} {r.get('path', '')}: {r.get('refused') or r}"
        for r in wrong
    ]
    tests = of(rows, "tests")
    if tests:
        names = ("passed", "failed", "skipped", "left_out")
        lines.append("tests/kernels: " + ", ".join(f"{sum(t[n] for t in tests)} {n}" for n in names))
    for r in of(rows, "compiled"):
        lines.append(
            f"stage {r['stage']}: {r['kernels']} kernels compiled in {r['seconds']} s, {r['from_cache']} from cache"
        )
    lines += [f"{r['recipe']} {r['where']}: {number(r['psnr'])} dB, CPU {number(r['cpu'])} ({r['off_db']:+.3f})"
              for r in of(rows, "beside the CPU")]  # fmt: skip
    for r in of(rows, "step"):
        time = f"{number(1e3 * r['median_ms'])} us" if "median_ms" in r else f"REFUSED {r.get('refused')}"
        lines.append(f"step, {r['case']}, {r['provider']}, {r['precision']}: {time}")
    lines += [f"step of a fit, {r['recipe']}: {number(r['us_a_step'])} us" for r in of(rows, "recipe")]
    for r in of(rows, "launches"):
        if "kernels" in r and "median_ms" in r:
            lines.append(f"launches, {r['case']}: whole {number(1e3 * r['median_ms'])} us, predicted "
                         f"{number(1e3 * r['predicted_ms']) if r.get('predicted_ms') else '-'} us; "
                         + ", ".join(f"{k['kernel']} {number(1e3 * k['median_ms'], 3)}" for k in r["kernels"]))  # fmt: skip
    lines += [f"{r['recipe']} from {r['init']} to {r['target']:g} dB: {number(r['seconds'])} s, {r['steps']} steps, "
              f"{number(r['psnr'])} dB ({r['stopped']})" for r in of(rows, "to PSNR")]  # fmt: skip
    lines += [f"{r['count']} x 3x{r['width']}, {r['name']}: {number(r['fits_per_s'])} fits/s, {number(r['psnr'])} dB"
              for r in of(rows, "fits")]  # fmt: skip
    lines += [
        f"values, {r['precision']}: {number(r['us'])} us, off by {number(r['most_off'], 2)}" for r in of(rows, "values")
    ]
    lines += [
        f"render {r.get('precision', '')}: {number(r['megapixels_per_s'])} megapixels/s" for r in of(rows, "render")
    ]
    for r in of(rows, "profile"):
        lines.append(f"profile, {r['recipe']}: {number(1e6 * r['seconds'] / r['steps'])} us a step, GPU busy "
                     f"{number(r['busy_us_a_step'])}, {number(r['launches_a_step'])} launches")  # fmt: skip
    lines += [
        f"ncu: {r.get('not_run') or {k: v for k, v in r.items() if k not in ('stage', 'what')}}"
        for r in of(rows, "ncu")
    ]
    failed = [r for r in rows if "failed" in r]
    left = [name for r in rows for name in r.get("left_out", []) if isinstance(r.get("left_out"), list)]
    lines.append(
        f"{len(failed)} failures, {len(left)} left out for want of time" + (": " + "; ".join(left) if left else "")
    )
    for r in failed[:30]:
        about = " ".join(str(v) for k, v in r.items() if k not in ("at_s", "failed", "trace", "took_s"))
        lines += [f"  FAILED stage {about}: {r['failed'][:300]}"]
    return "\n".join(lines)

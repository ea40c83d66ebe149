"""Where benchmarks/gpu.py measured, and tables: measurement, and beside it what kernels/roofline.py predicts."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from strainer_fast.benchmarks import harness
from strainer_fast.benchmarks.tables import named_provider, spread, table

Rows = Sequence[dict[str, Any]]


def machine(device: str) -> dict[str, Any]:
    """What every number must say about where it was measured."""
    from strainer_fast.ops.dispatch import triton_version

    found: dict[str, Any] = harness.machine() | {"triton": triton_version()}
    del found["engine"]  # of the CPU
    if device != "cuda":
        return found
    has = torch.cuda.get_device_properties(0)
    found |= {"gpu": has.name, "capability": f"{has.major}.{has.minor}", "processors": has.multi_processor_count}
    found |= {"memory_gb": round(has.total_memory / 1e9, 1), "cuda": torch.version.cuda or f"ROCm {torch.version.hip}"}
    with suppress(Exception):  # needs a package that PyTorch does not bring
        found["clock_mhz"] = torch.cuda.clock_rate()
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        this = f"--id=GPU-{has.uuid}" if hasattr(has, "uuid") else "--id=0"
        asked = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader", this]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
        found["driver"], found["most_clock"] = said.split(", ")
    return found


def _error(row: dict[str, Any]) -> str:
    """Of its bound."""
    if row.get("error") is None:
        return "-"
    return f"{row['error']:.1e} of {row['bound']:.1e} ({row['where']})"


def _compiling(row: dict[str, Any]) -> str:
    return f"{row['first_s']:.1f}" if "first_s" in row else "-"


def equality(rows: Rows) -> str:
    """What agrees with float64."""
    lines = [
        [r["case"], r["precision"], r["what"], r["path"], _error(r), r.get("refused", "equal"), _compiling(r)]
        for r in rows
    ]
    return table(["case", "precision", "what", "path", "worst error of its bound", "verdict", "first call s"], lines)


def times(rows: Rows, what: str, unit: str = "ms") -> str:
    """Ours and the peers."""
    factor = 1e3 if unit == "us" else 1.0
    lines = []
    for r in rows:
        cells = [r["case"], named_provider(r), r["precision"], spread(r, factor)]
        median = r.get("median_ms")
        cells.append(f"{r['flops'] / median / 1e9:.3g}" if median and "flops" in r else "-")
        cells += [f"{r['peak_mb']:.0f}" if "peak_mb" in r else "-", _error(r), r.get("refused", ""), _compiling(r)]
        lines.append(cells)
    columns = [what, "provider", "precision", f"{unit} (p20 to p80)", "TFLOP/s", "peak MB", "worst error of its bound",
               "refused", "until measured s"]  # fmt: skip
    return table(columns, lines)


def fits(rows: Rows) -> str:
    """Fits per second."""
    lines = [
        [
            *(r["case"], named_provider(r), r["precision"]),
            f"{r['fits_per_s']:.3g}" if "fits_per_s" in r else "-",
            *(spread(r), _error(r), r.get("refused", "")),
        ]
        for r in rows
    ]
    columns = ["fits", "provider", "precision", "fits/s", "ms of all (p20 to p80)", "off of its bound", "refused"]
    return table(columns, lines)


def prediction(row: dict[str, Any]) -> str:
    """One step's launches: measured beside predicted."""
    title = f"### {row['case']}, {row['precision']}\n\n"
    if "refused" in row:
        return f"{title}No measurement: {row['refused']}"
    lines = [
        [k["kernel"], str(k["programs"]), spread(k, 1e3), *_predicted(k), k.get("bound", "-")] for k in row["kernels"]
    ]
    total = row | {"median_ms": row["sum_ms"]}
    lines.append(["sum", "", f"{1e3 * row['sum_ms']:.3g}", *_predicted(total), ""])
    lines.append(["all in one CUDA graph", "", spread(row, 1e3), *_predicted(row), ""])
    found = table(["kernel", "programs", "us (p20 to p80)", "predicted us", "measured / predicted", "bound"], lines)
    if row["peaks"] is None:
        return f"{title}{found}\n\nNo prediction: kernels/roofline.py has no peaks of {row['chip']}."
    peaks = ", ".join(f"{name} {value:g}" for name, value in row["peaks"].items())
    return f"{title}{found}\n\nPredicted with the peaks of {row['chip']} in kernels/roofline.py: {peaks}."


def _predicted(row: dict[str, Any]) -> tuple[str, str]:
    """Microseconds, and how many times as long the measurement is."""
    predicted = row.get("predicted_ms")
    if predicted is None:
        return "-", "-"
    return f"{1e3 * predicted:.3g}", f"{row['median_ms'] / predicted:.2f}"


def markdown(found: dict[str, Any]) -> str:
    """All tables."""
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    parts = [
        f"{machine}.",
        "Medians of interleaved rounds by CUDA events. A refused row has no time.",
        "## Equality with float64",
        equality(found["equality"]),
        "## Layers alone, in CUDA graphs",
        times(found["layers"], "layer", "us"),
        "## Training steps (losses, gradients, Adam)",
        times(found["steps"], "case"),
        "## Whole fits",
        fits(found["fits"]),
        "## Launches of a step beside their prediction",
        "A kernel alone runs again and again in a CUDA graph and may find its data in the cache; the last line is the "
        "step.",
        *(prediction(row) for row in found["predictions"]),
    ]
    return "\n\n".join(parts) + "\n"

"""What the GPU kernels take, compiled without a GPU, and a step's launches: predicted, and measured where there is one.

The numbers are those of `strainer_fast.kernels.aot` and `strainer_fast.kernels.roofline`, each in a process of its own:
compiling and Triton's interpreter exclude each other. Measurements come from `strainer_fast.benchmarks.gpu`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

CHIPS, QUICK_CHIPS = ("sm_80", "sm_90", "sm_100"), ("sm_90",)
PRECISIONS = ("fp16",)
STEP = "178x178, 5x256"
"""The case of benchmarks/gpu.py that the predicted step is."""
CASES = ("step", "step-strainer", "step-stacked")

_PREDICT = """
import json, sys
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.cases import POINTS
from strainer_fast.kernels.roofline import launches_of, step_times
found = {}
for chip in sys.argv[2:]:
    times = step_times(launches_of(CHIPS[chip], sys.argv[1], POINTS), CHIPS[chip])
    found[chip] = [{"kernel": t.name, "predicted_us": 1e6 * t.total, "bound": t.bound} for t in times]
print(json.dumps(found))
"""


def kernels_side(quick: bool, device: str, out: Path) -> dict[str, Any]:
    """The report of the ahead-of-time compiler, predictions, and what a GPU measured; or why there is none."""
    if find_spec("triton") is None:
        return {"missing": "triton is not installed"}
    chips = QUICK_CHIPS if quick else CHIPS
    compiled = _run("-m", "strainer_fast.kernels.aot", "--json", "--only", *CASES, "--precision", *PRECISIONS,
                    "--chip", *chips)  # fmt: skip
    predicted = _run("-c", _PREDICT, PRECISIONS[0], *chips)
    if isinstance(compiled, str) or isinstance(predicted, str):
        return {"missing": f"{compiled if isinstance(compiled, str) else predicted}"}
    return {"compiled": compiled, "predicted": predicted, "measured": measured(quick, device, out)}


def measured(quick: bool, device: str, out: Path) -> dict[str, Any] | None:
    """The whole report of benchmarks/gpu.py on a GPU; None without one."""
    if device != "cuda":
        return None
    path = out / "gpu.json"
    command = [sys.executable, "-m", "strainer_fast.benchmarks.gpu", "--out", str(path)] + ["--quick"] * quick
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL)
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def measured_us(document: dict[str, Any], chip: str, launch: int) -> float | None:
    """What a launch of STEP took on this chip, in microseconds; None where nobody measured that kernel there."""
    kernels = document["kernels"]
    for row in (kernels["measured"] or {}).get("predictions", ()):
        about = row["case"], row.get("chip"), row["precision"]
        if about == (STEP, chip, PRECISIONS[0]) and launch < len(row.get("kernels", ())):
            found = row["kernels"][launch]
            same = found["kernel"] == kernels["predicted"][chip][launch]["kernel"]
            return 1e3 * found["median_ms"] if same and "median_ms" in found else None
    return None


def _run(*arguments: str) -> Any:
    """The JSON that a Python program prints; or a line about why it did not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return (done.stderr.strip().splitlines() or ["nothing was printed"])[-1]

"""strainer-fast doctor"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from strainer_fast import __version__
from strainer_fast.cli import _options as opt
from strainer_fast.cli._console import Reporter, handled
from strainer_fast.fitting.explain import explain as explain_fit
from strainer_fast.kernels import cpu
from strainer_fast.models import Architecture
from strainer_fast.ops import choose_device, explain
from strainer_fast.ops.dispatch import triton_missing


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cpu_name() -> str:
    try:
        with Path("/proc/cpuinfo").open() as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


MODELS = {
    "178x178 colour, 5x256": ((178, 178, 3), Architecture()),
    "28x28 grey, 3x32": ((28, 28, 1), Architecture(hidden_features=32, num_layers=4, num_shared_layers=3)),
}
"""Usual networks, to say how a fit of each would run."""


def _path(shape: tuple[int, ...], network: Architecture) -> str:
    """What `strainer_fast.explain` says of fits of one shape by the default recipe and the one for small networks."""
    told = {name: explain_fit(name, [shape], architecture=network).splitlines()[1] for name in ("fast", "small")}
    return "; ".join(f"recipe {name}: {line.partition(': ')[2]}" for name, line in told.items())


@handled
def doctor(quiet: opt.Quiet = False, json: opt.Json = False) -> None:
    """Say what this machine has, what runs on it, and why."""
    reporter = Reporter(quiet, json)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    where = choose_device()
    problem = triton_missing(torch.device("cuda")) if gpus else "no GPU: the Triton kernels run on GPUs"
    facts = {
        "strainer_fast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _installed("triton"),
        "numpy": _installed("numpy"),
        "pillow": _installed("pillow"),
        "matplotlib": _installed("matplotlib") + " (demo pictures: extra `plots`)",
        "cpu": f"{_cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} PyTorch threads",
        "gpu": ", ".join(gpus) or "none that PyTorch sees",
        "native engine": ", ".join(cpu.available()) or cpu.missing(),
        "triton kernels": problem or "run on this GPU",
        "runs": explain(),
        "layers": "Triton kernels, fp32" if where.type == "cuda" and not problem else "PyTorch's own operations",
        **{f"fit, {name}": _path(shape, network) for name, (shape, network) in MODELS.items()},
    }
    width = max(map(len, facts))
    for name, value in facts.items():
        reporter.say(f"{name.ljust(width)}  {value}")
    reporter.emit(facts)

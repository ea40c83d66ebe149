"""Kernels are compiled in processes of their own: whether Triton compiles or interprets is decided once per process."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Reports = dict[tuple[str, str], dict[str, Any]]
"""Precision and case to what `kernels.aot --json` says."""

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")

COMPILED = (
    *("step", "step-512", "step-strainer", "step-stacked"),
    *("row/*/half/32", "row/heads/*", "row/network_step/*", "row/small_fits/*"),
    *("lone/forward_inference", "lone/sincos", "lone/newton_schulz", "lone/weighted_heads", "lone/kfac", "lone/muon"),
)
"""Cases that are compiled for every test here: steps of one network, of waves, of many heads, of a stack, and the
kernels whose tiles are largest beside the registers at each width. `make aot` compiles all."""

COMPILED_TF32X3 = (
    *("step", "row/heads/*/64/*", "row/heads/*/128/*", "row/network_*/64", "row/small_fits/*"),
    *("lone/forward_inference", "lone/sincos"),
)
"""Of tf32x3, which differs from tf32 in its products and from fp32 in nothing else."""


def python(*arguments: str, interpret: bool = False, cache: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run Python with Triton's compiler, or its interpreter; with a cache of compiled kernels of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    if cache:
        environment["TRITON_CACHE_DIR"] = str(cache)
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment)


def _compile(chip: str) -> Reports:
    found = []
    for precisions, cases in ((PRECISIONS, COMPILED), (("tf32x3",), COMPILED_TF32X3)):
        chosen = ("--chip", chip, "--precision", *precisions, "--only", *cases)
        done = python("-m", "strainer_fast.kernels.aot", "--json", *chosen)
        assert done.stdout, done.stderr
        found += json.loads(done.stdout)
    reports: Reports = {}
    for kernel in found:
        for case in kernel["cases"]:
            # A case may launch a kernel in several ways: step/forward, step/forward#2, ...
            same = sum(
                1 for precision, name in reports if precision == kernel["precision"] and name.split("#")[0] == case
            )
            reports[kernel["precision"], f"{case}#{same + 1}" if same else case] = kernel
    return reports


@pytest.fixture(scope="session")
def run_python() -> Run:
    return python


@pytest.fixture(scope="session")
def sm_80() -> Reports:
    return _compile("sm_80")


@pytest.fixture(scope="session")
def sm_90() -> Reports:
    return _compile("sm_90")


@pytest.fixture
def reports(request: pytest.FixtureRequest, chip: str) -> Reports:
    """Of the test's chip; each is compiled when the first test asks for it."""
    return request.getfixturevalue(chip)

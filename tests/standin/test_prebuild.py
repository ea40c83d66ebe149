"""Kernels compiled beforehand: what is in the cache is found again elsewhere, launchers included."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

ONE = """
import torch
from strainer_fast.benchmarks.first_light import prebuild

def sine():
    from strainer_fast.kernels.trig import launch_sincos
    x = torch.ones(64, device="cuda")
    launch_sincos(x, torch.empty_like(x), torch.empty_like(x))

prebuild.work = lambda: iter([("sine", sine), ("broken", lambda: 1 / 0)])
prebuild.fill(0, 1)
print(prebuild.pack())
"""


@pytest.mark.long
@pytest.mark.skipif(shutil.which("gcc") is None, reason="launchers need a C compiler")
def test_a_moved_cache_is_complete(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    def fill(folder: Path) -> str:
        done = subprocess.run([sys.executable, "-c", ONE], cwd=folder, env=environment | {"PYTHONPATH": str(ROOT)},
                              capture_output=True, text=True, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    printed = fill(first)
    assert re.search(r"1 kernels, 1 compiled now in \d+ s, [1-9] launchers linked now: _?sincos", printed), printed
    assert "broken: 0 compiled; then ZeroDivisionError" in printed
    archive = first / ".triton-cache" / "cache.tar.xz"
    kernels = second / ".triton-cache" / "kernels"
    kernels.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "tarfile", "-e", str(archive), str(kernels)], check=True, capture_output=True)
    assert not list(kernels.rglob("*.ptx")) and list(kernels.rglob("*.cubin"))
    assert "1 kernels, 0 compiled now in 0 s, 0 launchers linked now" in fill(second)

"""Memory of a one-pass step: a function of tile, width and depth, not of the number of points."""

import subprocess
import sys
from pathlib import Path

import pytest

from strainer_fast.kernels import cpu

pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak that Linux keeps")

MEASURE = """
import re, sys, torch, strainer_fast as sf
from strainer_fast.ops import losses_and_gradients
torch.set_num_threads(1)
def kilobytes(name): return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/status").read())[1])
engine, (size, width, layers) = sys.argv[1], map(int, sys.argv[2:])
model = sf.Siren(2, width, layers, 1)
points, values = sf.signals.grid((size, size)), torch.rand(1, size * size, 1)
def step(): return losses_and_gradients(engine, points, values, list(model.parameters()), model.omegas, True)
losses_and_gradients(engine, points[:5000], values[:, :5000], list(model.parameters()), model.omegas, True)
open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
before = kilobytes("VmRSS")
step()
print(kilobytes("VmHWM") - before)
"""


def peak_megabytes(*arguments: object) -> float:
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


ENGINES = pytest.mark.parametrize("name", ["tiled"] + ["native"] * bool(cpu.available()))


@ENGINES
def test_peak_does_not_grow_with_the_image(name: str) -> None:
    small, large = peak_megabytes(name, 512, 64, 4), peak_megabytes(name, 1024, 64, 4)
    # One hidden activation of the larger image alone would be 256 MB.
    assert small < 40
    assert abs(large - small) < 8


@pytest.mark.long
@ENGINES
def test_four_megapixels_at_width_256_fit_in_300_megabytes(name: str) -> None:
    assert peak_megabytes(name, 2048, 256, 6) < 300

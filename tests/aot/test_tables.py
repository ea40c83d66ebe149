"""The table of tiles is legal, the model adds up: nothing is compiled."""

import pytest

from strainer_fast.kernels.cases import row_name
from strainer_fast.kernels.chip import CHIPS, Chip
from strainer_fast.kernels.configs import generation, illegal
from strainer_fast.kernels.tiles import TABLE, Row

PAIRS = [(row, chip) for row in TABLE for chip in CHIPS.values() if generation(chip) == row.generation]


@pytest.mark.parametrize(("row", "chip"), PAIRS, ids=[f"{row_name(r)}-{c.name}" for r, c in PAIRS])
def test_rows_are_legal(row: Row, chip: Chip) -> None:
    assert illegal(row, chip) is None


def test_the_model_of_whole_small_fits_adds_up(run_python) -> None:
    code = """
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.small_fits_model import PHASE, UPDATE, launch_of, launch_time, work_of
chip = CHIPS["sm_90"]
launch = launch_of(chip, "fp16", 32)
networks, programs = launch.arguments["num_rows"], launch.grid[0]
assert programs == 2 * chip.processors and networks == 4 * programs
assert launch.arguments["parameters"] == 2 * 32 + 32 + 2 * 33 * 32 + 33 * 3
work, clocks = work_of(launch)
# 784 points are 13 tiles of 64; three layers forward and back, and a head.
assert clocks == 4 * 200 * (13 * 7 * PHASE + 3 * UPDATE)
assert work.product == 6 * networks * 200 * 13 * 64 * 32 * (2 * 32 + 16)
time = launch_time(launch, chip)
assert time.terms["latency"] == clocks / 1.76e9
assert networks / time.total > 5000  # fits a second, modelled: what the kernel was written for
assert launch_time(launch_of(chip, "fp16", 64), chip).total > time.total
print("ok")
"""
    done = run_python("-c", code)
    assert done.stdout == "ok\n", done.stderr


def test_rendering_is_modelled(run_python) -> None:
    done = run_python("-m", "strainer_fast.kernels.roofline", "--chip", "sm_90", "--render",
                      "--precision", "fp32", "tf32x3", "fp16")  # fmt: skip
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("| sm_90 |")]
    found = {cells[1]: (float(cells[2]), cells[4]) for cells in rows if len(cells) == 5}
    assert found["fp16"][1] == "network_forward-from-coordinates", done.stderr
    assert found["fp16"][0] < found["tf32x3"][0] < 0.5 * found["fp32"][0]


def test_the_model_adds_up(run_python) -> None:
    code = """
from strainer_fast.kernels.chip import CHIPS
from strainer_fast.kernels.roofline import LAUNCH, launches_of, step_times
chip = CHIPS["sm_90"]
work = {p: step_times(launches_of(chip, p, 178 * 178), chip) for p in ("fp16", "tf32")}
# Five layers of 256 and a head: forward and both gradients of four products, on tiles padded to 31744 rows.
flops = 2 * 31744 * 256 * 256
expected = {"forward_chain-first": 4, "gradient_chain": 3, "first_gradient-from-coordinates": 1, "weight_gradient": 4}
products = {t.name: t.terms["matrix"] for t in work["fp16"] if t.terms["matrix"] and t.name != "heads"}
assert products.keys() == expected.keys(), products
for name, count in expected.items():
    assert products[name] >= count * flops / (0.8 * 989e12), name
by_layers = [t.name for t in work["tf32"] if t.terms["matrix"] and t.name != "heads"]
assert [by_layers.count(n) for n in ("forward", "input_gradient", "weight_gradient")] == [4, 3, 1], by_layers
assert sum(t.total for t in work["fp16"]) <= 200e-6  # modelled: what the step was written for
assert all(t.total == max(t.terms.values()) + LAUNCH for t in work["fp16"])
# tf32x3 is three times the products of tf32, on equal tiles, and polynomials for its sines.
work |= {p: step_times(launches_of(chip, p, 178 * 178), chip) for p in ("tf32x3", "fp32")}
forward = {p: next(t.terms for t in work[p] if t.name == "forward") for p in ("tf32x3", "tf32")}
assert forward["tf32x3"]["matrix"] == 3 * forward["tf32"]["matrix"]
assert forward["tf32x3"]["special"] == 0 < forward["tf32"]["special"]
total = {p: sum(t.total for t in times) for p, times in work.items()}
assert total["tf32"] < total["tf32x3"] < 0.5 * total["fp32"], total
# Half the bytes and twice the matrix unit's speed.
assert sum(t.total for t in work["fp16"]) < 0.7 * sum(t.total for t in work["tf32"])
print("ok")
"""
    done = run_python("-c", code)
    assert done.stdout == "ok\n", done.stderr

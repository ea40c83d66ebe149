"""The kernels of a real training step compile to what they are written for, on GPUs that need not be here."""

from typing import Any

import pytest
import triton

PRECISIONS = ("fp32", "tf32x3", "tf32", "fp16", "bf16")
CHIPS = ("sm_80", "sm_90")
PRODUCTS = (
    "step/forward",
    "step/heads",
    "step/weight_gradient",
    "step/input_gradient",
    "step/first_gradient-from-coordinates",
)
"""Kernels that multiply matrices."""

ROWS = ("row/forward/{0}/half/32", "row/input_gradient/{0}/half/32", "row/weight_gradient/{0}/half/32")
OTHERS = ("step/forward-first", "step/reduce", "step/adam", "lone/sincos")

THROUGH_REGISTERS = {
    ("sm_90", "tf32", "step/weight_gradient"),
}
"""Products whose operands do not go to shared memory by 16-byte asynchronous copies: gaps to be closed.

Hopper's tf32 products take both operands along K only, so one that is stored along the other axis is turned round.
"""

CHAINS = {
    "step/forward": "step/forward_chain-first",
    "step/forward-first": "step/forward_chain-first",
    "step/input_gradient": "step/gradient_chain",
}
INSTEAD = {
    (chip, precision, "step/heads"): "step/residual"
    for chip, precision in (("sm_80", "tf32"), ("sm_80", "tf32x3"), ("sm_90", "tf32x3"))
} | {
    (chip, precision, case): chain for chip in CHIPS for precision in ("fp16", "bf16") for case, chain in CHAINS.items()
}
"""Where 256 units and their gradients do not fit the registers, heads go by residuals and the layers' products; where
a tile is as wide as a layer, all layers are one launch."""

TRITON = ".".join(triton.__version__.split(".")[:2])

SPILLS: dict[tuple[str, str], dict[tuple[str, str], int]] = {}
"""Of a compiler and a chip: the bytes a thread spills, by precision and case."""

MOST_REPEATS = 4
"""Where a product's operand is computed, not loaded, warps that share it each compute it, at most so many times."""

Reports = dict[tuple[str, str], dict[str, Any]]

every_chip = pytest.mark.parametrize("chip", CHIPS)
every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_product = pytest.mark.parametrize("case", PRODUCTS)


def kernel_of(reports: Reports, chip: str, precision: str, case: str) -> dict[str, Any]:
    case = INSTEAD.get((chip, precision, case), case)
    kernel = reports.get((precision, case)) or reports["fp32", case]  # the same in all precisions: compiled once
    assert kernel["report"], kernel["error"]
    return kernel


def report_of(reports: Reports, chip: str, precision: str, case: str) -> dict[str, Any]:
    return kernel_of(reports, chip, precision, case)["report"]


@every_chip
def test_only_what_is_known_spills(chip: str, reports: Reports) -> None:
    """Exactly: what is mended, or spills more, or with another compiler, is found here."""
    found = {key: k["report"] for key, k in reports.items() if k["report"]}
    spilled = {key: r["spilled"] for key, r in found.items() if r["spilled"] or r["reloaded"] or r["stack"]}
    assert spilled == SPILLS.get((TRITON, chip), {}), TRITON


@every_chip
def test_everything_compiles_and_fits(chip: str, reports: Reports) -> None:
    assert {key: k["error"] for key, k in reports.items() if not k["report"]} == {}
    shared = {"sm_80": 163, "sm_90": 227}[chip] * 1024
    assert {key: k["report"]["shared"] for key, k in reports.items() if k["report"]["shared"] > shared} == {}
    assert {key for key, k in reports.items() if k["report"]["blocks"] < 1} == set()
    expected = {(p, INSTEAD.get((chip, p, case), case)) for p in PRECISIONS for case in PRODUCTS}
    generation = {"sm_80": "ampere", "sm_90": "hopper"}[chip]
    expected |= {(p, row.format(generation)) for p in ("fp16", "bf16") for row in ROWS}
    assert expected <= set(reports)


@every_chip
@every_precision
def test_no_slow_path_and_no_local_memory(chip: str, precision: str, reports: Reports) -> None:
    for case in (*PRODUCTS, *OTHERS):
        report = report_of(reports, chip, precision, case)
        assert report["slow_paths"] == [], case
        if (precision, case) in SPILLS.get((TRITON, chip), {}):
            continue
        assert "LDL" not in report["counts"] and "STL" not in report["counts"], case


@every_chip
@pytest.mark.parametrize("precision", PRECISIONS[1:])
@every_product
def test_products_use_the_matrix_unit(chip: str, precision: str, case: str, reports: Reports) -> None:
    counts = report_of(reports, chip, precision, case)["counts"]
    assert counts.get({"sm_80": "HMMA", "sm_90": "HGMMA"}[chip], 0) > 0, counts


@every_chip
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("row", ROWS)
def test_narrow_layers_use_the_matrix_unit(chip: str, precision: str, row: str, reports: Reports) -> None:
    case = row.format({"sm_80": "ampere", "sm_90": "hopper"}[chip])
    assert report_of(reports, chip, precision, case)["matrix"] > 0


@every_chip
@every_product
def test_fp32_products_are_exact(chip: str, case: str, reports: Reports) -> None:
    report = report_of(reports, chip, "fp32", case)
    assert report["matrix"] == 0
    assert report["counts"]["FFMA"] > 0


@every_chip
@every_precision
@pytest.mark.parametrize("case", [*PRODUCTS, "step/forward-first", "lone/forward_inference", "lone/sincos"])
def test_sines(chip: str, precision: str, case: str, reports: Reports) -> None:
    """Instructions of the special-function unit are counted, not guessed.

    A tile's result is computed once, in the epilogue, by straight-line code: elements / threads sines, and as many
    cosines where the cosine is kept. An operand computed from coordinates stands once in the loop over its tiles.
    In fp32 and tf32x3 sines are polynomials.
    """
    kernel = kernel_of(reports, chip, precision, case)
    report = report_of(reports, chip, precision, case)
    found = report["counts"].get("MUFU.SIN", 0) + report["counts"].get("MUFU.COS", 0)
    if precision in ("fp32", "tf32x3"):
        assert found == 0
        return
    has, threads = kernel["constants"], 32 * report["warps"]
    points, outputs, inputs = (int(has.get(f"BLOCK_{axis}", 0)) for axis in "POK")
    kind = kernel["kernel"]
    result = {
        "forward_kernel": points * outputs * (2 if has.get("SAVE") == 2 else 1),
        "first_gradient_kernel": points * inputs,
        # The first layer's sines, and those of the hidden ones with their cosines, which stand once in a loop.
        "forward_chain_kernel": 3 * points * int(has.get("WIDTH", 0)),
        "_sincos_kernel": 2 * int(has.get("BLOCK", 0)),
    }.get(kind, 0)
    operand = points * inputs if has.get("FIRST") and kind != "first_gradient_kernel" else 0
    assert result + operand <= found * threads <= result + MOST_REPEATS * operand, (found, result, operand)


@every_chip
@pytest.mark.parametrize("precision", PRECISIONS[1:])
@pytest.mark.parametrize("case", [p for p in PRODUCTS if p != "step/heads"])  # read once, kept for three products
def test_operands_are_copied_asynchronously(chip: str, precision: str, case: str, reports: Reports) -> None:
    """cp.async ... 0x10: 16 bytes at once, past the registers."""
    wide = report_of(reports, chip, precision, case)["counts"].get("LDGSTS.16", 0)
    assert (wide > 0) == ((chip, precision, case) not in THROUGH_REGISTERS)


@every_chip
@pytest.mark.parametrize("precision", ["fp32", "tf32x3", "tf32", "fp16"])
@pytest.mark.parametrize("width", [32, 64])
def test_whole_small_fits(chip: str, precision: str, width: int, reports: Reports) -> None:
    """As many warps as the launcher counts on run at a time; nothing in local memory, sines without the slow path."""
    operand = "half" if precision == "fp16" else precision
    generation = {"sm_80": "ampere", "sm_90": "hopper"}[chip]
    case = f"row/small_fits/{generation}/{operand}/{width}"
    report = report_of(reports, chip, precision, case)
    assert report["blocks"] * report["warps"] >= 8
    assert (report["spilled"], report["stack"], report["slow_paths"]) == (0, 0, [])
    assert "LDL" not in report["counts"] and "STL" not in report["counts"]
    assert (report["matrix"] > 0) == (precision != "fp32")
    assert (report["counts"].get("MUFU.SIN", 0) > 0) == (precision not in ("fp32", "tf32x3"))

"""Sizes of tiles per kernel, chip, precision and width: a static table and the one predicate that says what is legal.

The table is data: `make aot` compiles every row for its chip and reports registers, spills and shared memory
(docs/aot.md); `make tune`, on a GPU, measures the legal alternatives and writes the rows anew. Nothing is tuned while
a program runs, so a kernel's results never depend on what else the machine was doing.
"""

from .chip import Chip, current_chip
from .tiles import TABLE as TABLE  # capture.table replaces it
from .tiles import Row, Tiles

FEW_INPUTS = 4
"""Layers with at most this many inputs (coordinates) use no matrix unit: thin products are cheaper without."""

BYTES = {"fp32": 4, "tf32x3": 4, "tf32": 4, "fp16": 2, "bf16": 2}
"""Size of an operand as it is stored."""

KERNELS = (
    *("forward", "forward_first", "input_gradient", "first_gradient", "weight_gradient"),
    *("heads", "network_forward", "network_step", "small_fits"),
)

REGISTERS = 65536
"""Of a multiprocessor, 32 bits each."""


def generation(chip: Chip) -> str:
    """Which rows of the table are for a chip: those of the newest generation that is not newer than it."""
    if chip.target != "cuda":
        return chip.target
    arch = int(chip.arch)
    small_shared = arch in (86, 87, 89) or arch >= 120
    if small_shared:
        return "ada"
    return "ampere" if arch < 90 else "hopper"


def tiles_for(
    kernel: str, precision: str, width: int, *, columns: int = 0, few: bool = False, chip: Chip | None = None
) -> Tiles:
    """The table's tiles for a kernel over layers of `width` units.

    Args:
        kernel: one of KERNELS.
        precision: one of mm.PRECISIONS.
        width: of the wider side of the layer.
        columns: of the heads; more than any row's `outputs` is an error.
        few: whether large tiles would leave multiprocessors idle (small images); prefers the row made for that.
        chip: the current one by default.
    """
    chip = chip or current_chip()
    wanted, operand = generation(chip), "half" if BYTES[precision] == 2 else precision
    rows = [r for r in TABLE if r.kernel == kernel and r.generation == wanted and operand in r.precisions]
    if kernel == "heads":
        rows = [r for r in rows if r.tiles.outputs >= columns]
    fits = [r for r in rows if r.width >= width and (few or not r.few)]
    if not fits:
        raise ValueError(f"{kernel}: expected a width of at most {max((r.width for r in rows), default=0)} in "
                         f"{precision} on {chip.name}, got {width}. Use the per-layer kernels.")  # fmt: skip
    return min(fits, key=lambda r: (r.width, not r.few, r.tiles.outputs if kernel == "heads" else 0)).tiles


def supports(kernel: str, precision: str, width: int, *, columns: int = 0, chip: Chip | None = None) -> bool:
    """Whether the table has tiles for this."""
    try:
        tiles_for(kernel, precision, width, columns=columns, chip=chip)
    except ValueError:
        return False
    return True


def illegal(row: Row, chip: Chip) -> str | None:
    """Why tiles cannot run on a chip; None where they can.

    Used by the table's tests and by the tuner. Shared memory counts the operands of a product once per stage;
    registers the sums in float32, which must leave room for the rest.
    """
    t, size = row.tiles, 4 if "half" not in row.precisions else 2
    sizes = {"points": t.points, "outputs": t.outputs, "inputs": t.inputs}
    for name, value in sizes.items():
        if value < 16 or value & (value - 1):
            return f"{name}: expected a power of two of at least 16, got {value}"
    if chip.target == "interpreter":
        return None
    if t.warps not in (4, 8) or not 1 <= t.stages <= 5:
        return f"warps and stages: expected 4 or 8 and 1 to 5, got {t.warps} and {t.stages}"
    m, n, k = {
        "forward": (t.points, t.outputs, t.inputs),
        "forward_first": (t.points, t.outputs, t.inputs),
        "input_gradient": (t.points, t.inputs, t.outputs),
        "first_gradient": (t.points, t.inputs, t.outputs),
        "weight_gradient": (t.outputs, t.inputs, t.points),
        # h or its gradient against all weights of a layer
        "heads": (t.points, t.inputs, t.outputs),
        "network_forward": (t.points, t.outputs, t.inputs),
        "network_step": (t.points, t.outputs, t.inputs),
        "small_fits": (t.points, t.outputs, t.inputs),
    }[row.kernel]
    shared = t.stages * (m + n) * k * size
    if shared > chip.shared:
        return f"shared memory: expected at most {chip.shared} bytes, got about {shared}"
    sums = m * n // (32 * t.warps)
    if sums > 128:
        return f"registers: expected at most 128 a thread for sums, got {sums}"
    return None

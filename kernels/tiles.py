"""The table of tiles, as data; see configs.py for what chooses from it and `make tune` for what writes it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel's tile, powers of two of at least 16; warps and pipeline stages of a program."""

    points: int = 64
    outputs: int = 64
    inputs: int = 32
    warps: int = 4
    stages: int = 3


@dataclass(frozen=True)
class Row:
    """Tiles for layers up to `width` units."""

    kernel: str
    generation: str
    precisions: tuple[str, ...]
    width: int
    tiles: Tiles
    few: bool = False  # for so few points that larger tiles would leave multiprocessors idle


HALF, TF32, TF32X3, FP32 = ("half",), ("tf32",), ("tf32x3",), ("fp32",)
FLOAT32 = ("tf32", "tf32x3", "fp32")  # operands as they are stored
ANY = 1 << 20  # widths without a limit


def _rows(kernel: str, precisions: tuple[str, ...], generations: str, *sizes: tuple[int, Tiles]) -> list[Row]:
    return [Row(kernel, g, precisions, width, tiles) for g in generations.split() for width, tiles in sizes]


def _few(kernel: str, precisions: tuple[str, ...], generations: str, tiles: Tiles) -> list[Row]:
    return [Row(kernel, g, precisions, ANY, tiles, few=True) for g in generations.split()]


NVIDIA = "ampere ada hopper"

# Of the forward products of narrow layers.
NARROW = ((16, Tiles(128, 16, 16, 4, 2)), (32, Tiles(128, 32, 32, 4, 2)), (64, Tiles(128, 64, 64, 4, 2)))
NARROW_FP32 = ((16, Tiles(64, 16, 16, 4, 2)), (32, Tiles(64, 32, 32, 4, 2)))

# Tiles(points, outputs, inputs, warps, stages). What each takes of a chip: docs/aot.md.
TABLE: tuple[Row, ...] = (
    # y = sin(x W^T + b): points x outputs, in steps of inputs
    *_rows("forward", HALF, NVIDIA, *NARROW, (128, Tiles(128, 128, 32, 8, 3))),
    *_rows("forward", HALF, "ampere", (ANY, Tiles(128, 256, 64, 8, 3))),
    *_rows("forward", HALF, "ada", (ANY, Tiles(128, 256, 32, 8, 3))),
    *_rows("forward", HALF, "hopper", (ANY, Tiles(128, 256, 32, 8, 4))),
    *_rows("forward", TF32, NVIDIA, *NARROW[:2], (64, Tiles(64, 64, 32, 4, 3)), (ANY, Tiles(128, 128, 32, 8, 3))),
    *_rows("forward", FP32, NVIDIA, *NARROW_FP32, (ANY, Tiles(64, 64, 32, 4, 3))),
    *_few("forward", HALF, NVIDIA, Tiles(64, 64, 64, 4, 3)),
    *_few("forward", TF32, NVIDIA, Tiles(64, 64, 32, 4, 3)),
    # the same with coordinates in place of the inputs
    *_rows("forward_first", HALF, NVIDIA, *NARROW, (ANY, Tiles(128, 128, 64, 8, 3))),
    *_rows("forward_first", TF32, NVIDIA, *NARROW[:2], (64, Tiles(64, 64, 32, 4, 3)), (ANY, Tiles(128, 128, 32, 8, 3))),
    *_rows("forward_first", FP32, NVIDIA, *NARROW_FP32, (ANY, Tiles(64, 64, 32, 4, 3))),
    # dx = dz W: points x inputs, in steps of outputs
    *_rows("input_gradient", HALF, "ampere hopper", (16, Tiles(128, 16, 16, 4, 2)), (32, Tiles(128, 32, 32, 4, 2)),
           (64, Tiles(128, 64, 64, 4, 2)), (128, Tiles(128, 64, 128, 8, 3)), (ANY, Tiles(128, 64, 256, 8, 3))),
    *_rows("input_gradient", HALF, "ada", (16, Tiles(128, 16, 16, 4, 2)), (32, Tiles(128, 32, 32, 4, 2)),
           (64, Tiles(128, 64, 64, 4, 2)), (ANY, Tiles(128, 32, 128, 8, 3))),
    *_rows("input_gradient", TF32, NVIDIA, (16, Tiles(128, 16, 16, 4, 2)), (32, Tiles(128, 32, 32, 4, 2)),
           (64, Tiles(64, 32, 64, 4, 3)), (ANY, Tiles(64, 32, 128, 8, 3))),
    *_rows("input_gradient", FP32, NVIDIA, (16, Tiles(64, 16, 16, 4, 2)), (32, Tiles(64, 32, 32, 4, 2)),
           (ANY, Tiles(64, 32, 64, 4, 3))),
    *_few("input_gradient", HALF, NVIDIA, Tiles(64, 64, 64, 4, 3)),
    *_few("input_gradient", TF32, NVIDIA, Tiles(64, 32, 64, 4, 3)),
    # the first layer's gradients from the second layer's dz: the same, coordinates and sums in the epilogue
    *_rows("first_gradient", HALF, "ampere hopper", (16, Tiles(128, 16, 16, 4, 2)), (32, Tiles(128, 32, 32, 4, 2)),
           (64, Tiles(128, 64, 64, 4, 2)), (ANY, Tiles(128, 64, 128, 8, 3))),
    *_rows("first_gradient", HALF, "ada", (16, Tiles(128, 16, 16, 4, 2)), (32, Tiles(128, 32, 32, 4, 2)),
           (64, Tiles(128, 64, 64, 4, 2)), (ANY, Tiles(128, 32, 128, 8, 3))),
    *_rows("first_gradient", TF32, NVIDIA, (16, Tiles(128, 16, 16, 4, 2)), (32, Tiles(128, 32, 32, 4, 2)),
           (64, Tiles(64, 32, 64, 4, 3)), (ANY, Tiles(64, 32, 128, 8, 3))),
    *_rows("first_gradient", FP32, NVIDIA, (16, Tiles(64, 16, 16, 4, 2)), (32, Tiles(64, 32, 32, 4, 2)),
           (ANY, Tiles(64, 32, 64, 4, 3))),
    # dW = dz^T x: outputs x inputs, in steps of points
    *_rows("weight_gradient", HALF, NVIDIA, (16, Tiles(64, 16, 16, 4, 2)), (32, Tiles(64, 32, 32, 4, 2)),
           (64, Tiles(64, 64, 64, 4, 3)), (128, Tiles(64, 128, 128, 8, 3))),
    *_rows("weight_gradient", HALF, "ampere ada", (ANY, Tiles(64, 128, 128, 8, 3))),
    *_rows("weight_gradient", HALF, "hopper", (ANY, Tiles(64, 128, 256, 8, 3))),
    *_rows("weight_gradient", TF32, NVIDIA, (16, Tiles(32, 16, 16, 4, 2)), (32, Tiles(32, 32, 32, 4, 2)),
           (64, Tiles(32, 64, 64, 4, 3)), (ANY, Tiles(32, 128, 64, 8, 3))),
    *_rows("weight_gradient", FP32, NVIDIA, (16, Tiles(32, 16, 16, 4, 2)), (32, Tiles(32, 32, 32, 4, 2)),
           (ANY, Tiles(16, 64, 64, 8, 3))),
    # heads with their loss: points; as `outputs` the most columns, and the whole width at once
    *_rows("heads", HALF, NVIDIA, (16, Tiles(32, 32, 16, 4, 1)), (32, Tiles(64, 32, 32, 8, 1)),
           (64, Tiles(32, 32, 64, 4, 1)), (128, Tiles(32, 32, 128, 8, 1))),
    *_rows("heads", HALF, "ampere ada", (256, Tiles(16, 32, 256, 8, 1))),
    *_rows("heads", HALF, "hopper", (128, Tiles(64, 16, 128, 8, 1)), (256, Tiles(64, 16, 256, 8, 2)),
           (256, Tiles(32, 32, 256, 8, 2))),
    *_rows("heads", TF32, NVIDIA, (32, Tiles(32, 32, 32, 4, 1)), (64, Tiles(32, 32, 64, 4, 1)),
           (128, Tiles(16, 32, 128, 8, 1))),
    *_rows("heads", TF32, "hopper", (256, Tiles(32, 16, 256, 8, 1)), (256, Tiles(16, 32, 256, 8, 1))),
    *_rows("heads", FP32, NVIDIA, (32, Tiles(32, 32, 32, 8, 1)), (64, Tiles(16, 32, 64, 4, 1)),
           (128, Tiles(16, 32, 128, 8, 1)), (256, Tiles(16, 16, 256, 8, 1))),
    # whole networks: points; the width at once. Wider ones do not fit a processor's memory.
    *_rows("network_forward", HALF, NVIDIA, (64, Tiles(128, 64, 64, 4, 2)), (128, Tiles(128, 128, 128, 8, 1))),
    *_rows("network_forward", HALF, "ampere hopper", (256, Tiles(64, 256, 256, 8, 1))),
    *_rows("network_forward", TF32, NVIDIA, (64, Tiles(64, 64, 64, 4, 1)), (128, Tiles(64, 128, 128, 8, 1))),
    *_rows("network_forward", FP32, NVIDIA, (32, Tiles(64, 32, 32, 4, 1)), (64, Tiles(32, 64, 64, 4, 1))),
    # a training step of whole networks: points, the width, and as `inputs` the columns of a weight gradient at once
    *_rows("network_step", HALF, "ampere ada", (32, Tiles(32, 32, 32, 4, 1))),
    *_rows("network_step", HALF, "hopper", (32, Tiles(64, 32, 16, 4, 1))),
    *_rows("network_step", HALF, NVIDIA, (64, Tiles(64, 64, 32, 8, 1))),
    *_rows("network_step", HALF, "ada hopper", (128, Tiles(32, 128, 32, 8, 1))),
    *_rows("network_step", HALF, "ampere", (128, Tiles(16, 128, 32, 8, 1))),
    *_rows("network_step", TF32, "ampere ada", (32, Tiles(32, 32, 32, 4, 1))),
    *_rows("network_step", TF32, "hopper", (32, Tiles(64, 32, 32, 8, 1))),
    *_rows("network_step", TF32, NVIDIA, (64, Tiles(32, 64, 32, 8, 1))),
    *_rows("network_step", FP32, NVIDIA, (32, Tiles(32, 32, 32, 8, 1))),
    # whole fits of small networks: as a training step. One stage: products must not be fetched across barriers.
    *_rows("small_fits", HALF, "ampere ada", (32, Tiles(64, 32, 32, 4, 1)), (64, Tiles(32, 64, 32, 8, 1))),
    *_rows("small_fits", HALF, "hopper", (32, Tiles(64, 32, 32, 4, 1)), (64, Tiles(32, 64, 32, 4, 1))),
    *_rows("small_fits", TF32, NVIDIA, (32, Tiles(32, 32, 32, 4, 1)), (64, Tiles(16, 64, 32, 4, 1))),
    *_rows("small_fits", FP32, NVIDIA, (32, Tiles(32, 32, 32, 8, 1)), (64, Tiles(16, 64, 32, 8, 1))),
    # tf32x3, which holds two operands for each of tf32's and takes its sums apart from those of the steps before
    *_rows("forward", TF32X3, NVIDIA, *NARROW_FP32, (64, Tiles(64, 64, 32, 4, 3))),
    *_rows("forward", TF32X3, "ampere ada", (ANY, Tiles(128, 64, 32, 8, 3))),
    *_rows("forward", TF32X3, "hopper", (ANY, Tiles(128, 128, 32, 8, 3))),
    *_few("forward", TF32X3, NVIDIA, Tiles(64, 64, 32, 4, 3)),
    *_rows("forward_first", TF32X3, NVIDIA, *NARROW_FP32, (ANY, Tiles(64, 64, 32, 4, 3))),
    *_rows("input_gradient", TF32X3, NVIDIA, (16, Tiles(64, 16, 16, 4, 2)), (32, Tiles(64, 32, 32, 4, 2)),
           (64, Tiles(64, 32, 64, 4, 3)), (ANY, Tiles(64, 32, 128, 8, 3))),
    *_few("input_gradient", TF32X3, NVIDIA, Tiles(64, 32, 64, 4, 3)),
    *_rows("first_gradient", TF32X3, NVIDIA, (16, Tiles(64, 16, 16, 4, 2)), (32, Tiles(64, 32, 32, 4, 2)),
           (64, Tiles(64, 32, 64, 4, 3)), (ANY, Tiles(64, 32, 128, 8, 3))),
    *_rows("weight_gradient", TF32X3, NVIDIA, (16, Tiles(32, 16, 16, 4, 2)), (32, Tiles(32, 32, 32, 4, 2)),
           (64, Tiles(32, 64, 64, 4, 3)), (ANY, Tiles(32, 128, 64, 8, 3))),
    *_rows("heads", TF32X3, NVIDIA, (32, Tiles(32, 32, 32, 4, 1)), (64, Tiles(16, 32, 64, 4, 1))),
    *_rows("heads", TF32X3, "ampere ada", (128, Tiles(16, 16, 128, 8, 1))),
    *_rows("heads", TF32X3, "hopper", (128, Tiles(16, 32, 128, 8, 1))),
    *_rows("network_forward", TF32X3, "ampere ada", (32, Tiles(64, 32, 32, 4, 1)), (64, Tiles(32, 64, 64, 4, 1))),
    *_rows("network_forward", TF32X3, "hopper", (32, Tiles(64, 32, 32, 4, 1)), (64, Tiles(64, 64, 64, 4, 1)),
           (128, Tiles(64, 128, 128, 8, 1))),
    *_rows("network_step", TF32X3, "ampere ada", (32, Tiles(16, 32, 32, 4, 1))),
    *_rows("network_step", TF32X3, "hopper", (32, Tiles(32, 32, 32, 8, 1))),
    *_rows("network_step", TF32X3, NVIDIA, (64, Tiles(16, 64, 32, 8, 1))),
    *_rows("small_fits", TF32X3, NVIDIA, (32, Tiles(16, 32, 32, 4, 1)), (64, Tiles(16, 64, 32, 8, 1))),
    # AMD: fewer stages, 64 KiB of shared memory
    *_rows("forward", HALF, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(128, 128, 32, 8, 2))),
    *_rows("forward_first", HALF, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(128, 128, 32, 8, 2))),
    *_rows("forward_first", FLOAT32, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(64, 64, 32, 4, 2))),
    *_rows("input_gradient", HALF, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(128, 32, 128, 8, 2))),
    *_rows("first_gradient", HALF, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(128, 32, 128, 8, 2))),
    *_rows("first_gradient", FLOAT32, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(64, 32, 64, 4, 2))),
    *_rows("weight_gradient", HALF, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(64, 128, 128, 8, 2))),
    *_rows("forward", FLOAT32, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(64, 64, 32, 4, 2))),
    *_rows("input_gradient", FLOAT32, "hip", (32, Tiles(64, 32, 32, 4, 2)), (ANY, Tiles(64, 32, 64, 4, 2))),
    *_rows("weight_gradient", FLOAT32, "hip", (32, Tiles(32, 32, 32, 4, 2)), (ANY, Tiles(32, 64, 64, 4, 2))),
    # The interpreter pays per operation, not per number.
    *(Row(kernel, "interpreter", ("half", *FLOAT32), width, tiles)
      for kernel in ("forward", "forward_first", "input_gradient", "first_gradient", "weight_gradient")
      for width, tiles in ((16, Tiles(1024, 16, 16)), (64, Tiles(1024, 64, 64)), (ANY, Tiles(1024, 256, 256)))),
    *_rows("heads", ("half", *FLOAT32), "interpreter", (512, Tiles(1024, 32, 512))),
    *_rows("network_forward", ("half", *FLOAT32), "interpreter", (256, Tiles(1024, 256, 256))),
    *_rows("network_step", ("half", *FLOAT32), "interpreter", (128, Tiles(1024, 128, 128))),
    *_rows("small_fits", ("half", *FLOAT32), "interpreter", (64, Tiles(1024, 64, 64))),
)  # fmt: skip

"""What `make aot` compiles, as data: every row of the table of tiles, and the kernels of a real training step.

A case calls launchers on meta tensors; capture.py records what they launch. To add kernels: append a Case, and for a
new kind of table row a function in ROW_CASES.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .chip import Chip
from .configs import BYTES, generation
from .layers import FewInputs, launch_forward, launch_input_gradient, launch_slope, launch_weight_gradient, splits_for
from .mm import PRECISIONS
from .tiles import ANY, TABLE, Row
from .trig import launch_sincos

POINTS, WIDTH, COORDINATES, CHANNELS, LAYERS = 178 * 178, 256, 2, 3, 5
"""The step that is looked at: an image of the paper's size, its network."""

FEW_POINTS = 4096
"""So few that rows made for small images are taken."""

_DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Case:
    """A launch, or a few, to be compiled."""

    name: str
    run: Callable[[str], None]  # launches with this precision
    precisions: tuple[str, ...] = PRECISIONS
    generation: str | None = None  # of chips it is for; None: all
    row: Row | None = None  # whose tiles it must take

    def wanted(self, chip: Chip, precision: str) -> bool:
        """Whether it is for this chip and precision."""
        return precision in self.precisions and self.generation in (None, generation(chip))


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of no device."""
    return torch.empty(shape, dtype=dtype, device="meta")


def padded(points: int = POINTS) -> int:
    """Rows of buffers: no tile reaches over their end."""
    return -(-points // 256) * 256


def weight(outputs: int, inputs: int, precision: str, *, transposed: bool = False) -> Tensor:
    """[1, outputs, inputs] as the optimiser leaves it; transposed: the same numbers, stored [inputs, outputs]."""
    if transposed:
        return empty(1, inputs, outputs, dtype=_DTYPES[precision]).mT
    return empty(1, outputs, inputs, dtype=_DTYPES[precision])


def activations(precision: str, points: int = POINTS, width: int = WIDTH) -> Tensor:
    """[1, points, width] as a layer leaves it for the next one's product."""
    return empty(1, padded(points), width, dtype=_DTYPES[precision])


def first_layer(width: int = WIDTH) -> FewInputs:
    """Weight and bias of the first layer."""
    return empty(1, width, COORDINATES), empty(1, width)


def forward(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """A hidden layer in training: y and the cosine are kept."""
    y = activations(precision, points, width)
    launch_forward(activations(precision, points, width), weight(width, width, precision), empty(1, width), y,
                   cosine=torch.empty_like(y), omega=1.0, operand=True, precision=precision)  # fmt: skip


def forward_from_coordinates(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """The second layer, which computes the first one's output."""
    y = activations(precision, points, width)
    launch_forward(empty(points, COORDINATES), weight(width, width, precision), empty(1, width), y,
                   cosine=torch.empty_like(y), omega=1.0, first=first_layer(width), operand=True,
                   precision=precision)  # fmt: skip


def forward_inference(precision: str) -> None:
    """A hidden layer of which only y is wanted."""
    launch_forward(activations(precision), weight(WIDTH, WIDTH, precision), empty(1, WIDTH), activations(precision),
                   omega=1.0, operand=True, precision=precision)  # fmt: skip


def forward_layer(precision: str) -> None:
    """A layer on its own, as autograd calls it: float32 tensors with a ragged end, the argument saved."""
    y = empty(1, POINTS, WIDTH)
    launch_forward(empty(POINTS, WIDTH), weight(WIDTH, WIDTH, "fp32"), empty(1, WIDTH), y, z=torch.empty_like(y),
                   omega=30.0, precision=precision)  # fmt: skip


def forward_few_inputs(precision: str) -> None:
    """A first layer on its own."""
    y = empty(1, POINTS, WIDTH)
    launch_forward(empty(POINTS, COORDINATES), weight(WIDTH, COORDINATES, "fp32"), empty(1, WIDTH), y,
                   z=torch.empty_like(y), omega=30.0, precision=precision)  # fmt: skip


def slope(precision: str) -> None:
    """The backward pass of a lone layer begins with it."""
    z = empty(1, POINTS, WIDTH)
    launch_slope(torch.empty_like(z), z, torch.empty_like(z), omega=30.0, precision=precision)


def input_gradient(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """dz of the layer before; tf32 takes a transposed copy of W: Hopper's product reads along K only."""
    dx = activations(precision, points, width)
    launch_input_gradient(activations(precision, points, width),
                          weight(width, width, precision, transposed=precision == "tf32"), dx, torch.empty_like(dx),
                          operand=True, precision=precision)  # fmt: skip


def input_gradient_of_coordinates(precision: str) -> None:
    """dz of the first layer, whose cosine is computed."""
    launch_input_gradient(activations(precision), weight(WIDTH, WIDTH, precision, transposed=precision == "tf32"),
                          activations(precision), first=first_layer(), x=empty(POINTS, COORDINATES), operand=True,
                          precision=precision)  # fmt: skip


def weight_gradient(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """dW and db of a hidden layer."""
    splits = splits_for(padded(points), width, width, 1, precision)
    launch_weight_gradient(activations(precision, points, width), activations(precision, points, width),
                           empty(splits, 1, width, width), empty(splits, 1, width), precision=precision)  # fmt: skip


def weight_gradient_from_coordinates(precision: str) -> None:
    """dW and db of the second layer, which computes the first one's output."""
    splits = splits_for(padded(), WIDTH, WIDTH, 1, precision)
    launch_weight_gradient(activations(precision), empty(POINTS, COORDINATES), empty(splits, 1, WIDTH, WIDTH),
                           empty(splits, 1, WIDTH), first=first_layer(), precision=precision)  # fmt: skip


def weight_gradient_few_inputs(precision: str) -> None:
    """dW and db of the first layer."""
    splits = splits_for(padded(), WIDTH, COORDINATES, 1, precision)
    launch_weight_gradient(activations(precision), empty(POINTS, COORDINATES), empty(splits, 1, WIDTH, COORDINATES),
                           empty(splits, 1, WIDTH), precision=precision)  # fmt: skip


def sincos(precision: str) -> None:
    """The sine alone."""
    x = empty(1 << 20)
    launch_sincos(x, torch.empty_like(x), torch.empty_like(x), precision=precision)


ROW_CASES: dict[str, Callable[[str, int, int], None]] = {
    "forward": forward,
    "input_gradient": input_gradient,
    "weight_gradient": weight_gradient,
}
"""How to call the kernel that rows of the table are for: precision, points, width."""


def row_name(row: Row) -> str:
    """row/forward/hopper/half/64."""
    width = "any" if row.width == ANY else str(row.width)
    return "/".join(["row", row.kernel, row.generation, *row.precisions, width, *(["few"] if row.few else [])])


def row_cases(table: tuple[Row, ...] = TABLE) -> list[Case]:
    """One case for each row: layers of the widest width it is for."""

    def case(row: Row) -> Case:
        points, width = FEW_POINTS if row.few else POINTS, min(row.width, WIDTH)
        precisions = tuple(p for p in PRECISIONS if ("half" if BYTES[p] == 2 else p) in row.precisions)
        call = ROW_CASES[row.kernel]
        return Case(row_name(row), lambda precision: call(precision, points, width), precisions, row.generation, row)

    return [case(row) for row in table if row.generation != "interpreter" and row.kernel in ROW_CASES]


STEP: tuple[Case, ...] = tuple(
    Case(f"step/{role.__name__}", role)
    for role in (
        forward_from_coordinates,
        forward,
        input_gradient,
        input_gradient_of_coordinates,
        weight_gradient,
        weight_gradient_from_coordinates,
        weight_gradient_few_inputs,
    )
)
"""Kernels of a training step of the whole network."""

LONE: tuple[Case, ...] = tuple(
    Case(f"layer/{role.__name__}", role)
    for role in (forward_inference, forward_layer, forward_few_inputs, slope, sincos)
)
"""Kernels of layers on their own."""

CASES: list[Case] = [*row_cases(), *STEP, *LONE]

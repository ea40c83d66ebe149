"""What `make aot` compiles, as data: every row of the table of tiles, and the kernels of a real training step.

A case calls launchers on meta tensors; capture.py records what they launch. To add kernels: append a Case, and for a
new kind of table row a function in ROW_CASES.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .chip import Chip
from .configs import BYTES, generation
from .heads import fuses, heads_splits, launch_heads_loss
from .kfac import Joined, launch_kfac_update, launch_settle
from .layers import (
    first_gradient_splits,
    launch_first_gradient,
    launch_forward,
    launch_input_gradient,
    launch_slope,
    launch_weight_gradient,
    splits_for,
)
from .mm import PRECISIONS
from .muon import launch_momenta, launch_muon_update
from .newton_schulz import launch_newton_schulz, newton_schulz_scratch
from .on_chip import Weights, launch_network_forward, launch_network_step, scratch_size, step_programs
from .optim import launch_adam, launch_advance, launch_copies
from .plan import Network
from .segments import DTYPES
from .siren import Pipeline
from .small_fits import Fits, Layout, launch_small_fits, small_fits_programs, small_fits_scratch
from .stacks import Stacks
from .tiles import ANY, TABLE, Row
from .trig import launch_sincos

POINTS, WIDTH, COORDINATES, CHANNELS, LAYERS = 178 * 178, 256, 2, 3, 5
"""The step that is looked at: an image of the paper's size, its network."""

FEW_POINTS = 4096
"""So few that rows made for small images are taken."""


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
    """A tensor of the device that capture sets; on a GPU with numbers in it, which time and power depend on."""
    tensor = torch.empty(shape, dtype=dtype)
    return tensor if tensor.is_meta or not dtype.is_floating_point else tensor.normal_()


def padded(points: int = POINTS) -> int:
    """Rows of buffers: no tile reaches over their end."""
    return -(-points // 256) * 256


def weight(outputs: int, inputs: int, precision: str, *, transposed: bool = False) -> Tensor:
    """[1, outputs, inputs] as the optimiser leaves it; transposed: the same numbers, stored [inputs, outputs]."""
    if transposed:
        return empty(1, inputs, outputs, dtype=DTYPES[precision]).mT
    return empty(1, outputs, inputs, dtype=DTYPES[precision])


def activations(precision: str, points: int = POINTS, width: int = WIDTH) -> Tensor:
    """[1, points, width] as a layer leaves it for the next one's product."""
    return empty(1, padded(points), width, dtype=DTYPES[precision])


def forward(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """A hidden layer in training: y and the cosine are kept."""
    y = activations(precision, points, width)
    launch_forward(activations(precision, points, width), weight(width, width, precision), empty(1, width), y,
                   cosine=torch.empty_like(y), omega=1.0, operand=True, precision=precision)  # fmt: skip


def forward_first(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """The first layer in training: its cosine is not kept."""
    launch_forward(empty(points, COORDINATES), weight(width, COORDINATES, "fp32"), empty(1, width),
                   activations(precision, points, width), omega=1.0, operand=True, precision=precision)  # fmt: skip


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


def weight_gradient(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """dW and db of a hidden layer."""
    splits = splits_for(padded(points), width, width, 1, precision)
    launch_weight_gradient(activations(precision, points, width), activations(precision, points, width),
                           empty(splits, 1, width, width), empty(splits, 1, width), precision=precision)  # fmt: skip


def weight_gradient_few_inputs(precision: str) -> None:
    """dW and db of the first layer."""
    splits = splits_for(padded(), WIDTH, COORDINATES, 1, precision)
    launch_weight_gradient(activations(precision), empty(POINTS, COORDINATES), empty(splits, 1, WIDTH, COORDINATES),
                           empty(splits, 1, WIDTH), precision=precision)  # fmt: skip


def sincos(precision: str) -> None:
    """The sine alone."""
    x = empty(1 << 20)
    launch_sincos(x, torch.empty_like(x), torch.empty_like(x), precision=precision)


def first_gradient(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """The first layer's dW and db."""
    splits = first_gradient_splits(padded(points), width, precision)
    launch_first_gradient(activations(precision, points, width),
                          weight(width, width, precision, transposed=precision == "tf32"), empty(points, COORDINATES),
                          empty(splits, 1, width, COORDINATES), empty(splits, 1, width),
                          first=(empty(1, width, COORDINATES), empty(1, width)), precision=precision)  # fmt: skip


def heads(precision: str, points: int = POINTS, width: int = WIDTH, count: int = 10, later_wave: bool = False) -> None:
    """Heads of three channels: loss, gradients and dz; of weighted points of a later wave, it takes most registers."""
    rows, columns = padded(points), count * CHANNELS
    splits = heads_splits(rows, 1, columns, width, precision)
    h = activations(precision, points, width)
    values = empty(count, points, CHANNELS)
    launch_heads_loss(h, weight(columns, width, precision), empty(1, columns), values, empty(count),
                      empty(splits, 1, columns), cosine=torch.empty_like(h), dz=torch.empty_like(h),
                      dw=empty(splits, 1, columns, width), db=empty(splits, 1, columns), add=later_wave,
                      point_weights=empty(count, points) if later_wave else None, precision=precision)  # fmt: skip


def weighted_heads(precision: str) -> None:
    """One head and many, with a weight for every point, added to the sums of waves before."""
    for width in (64, WIDTH):
        for count in (1, 10):
            if fuses(count * CHANNELS, width, precision):
                heads(precision, width=width, count=count, later_wave=True)


def _weights(width: int, hidden: int, precision: str | None, splits: int | None = None) -> Weights:
    """Of a network in fp32 with its operands, or partial sums of their gradients.

    Hidden layers lie behind the first of them, which is what launchers are given: a GPU writes to all.
    """
    lead = (1,) if splits is None else (splits, 1)
    operand = DTYPES[precision] if precision else torch.float32
    return Weights(
        empty(*lead, width, COORDINATES),
        empty(*lead, width),
        empty(hidden, *lead, width, width, dtype=operand)[0],
        empty(hidden, *lead, width)[0],
        empty(*lead, CHANNELS, width, dtype=operand),
        empty(*lead, CHANNELS),
        hidden,
        math.prod(lead) * width * width,
        math.prod(lead) * width,
    )


def network_forward(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """Values of a whole network."""
    weights = _weights(width, LAYERS - 1, precision)
    launch_network_forward(empty(points, COORDINATES), weights, empty(1, points, CHANNELS), precision=precision)


def network_step(precision: str, points: int = POINTS, width: int = WIDTH) -> None:
    """Loss and all gradients of a whole network."""
    splits, programs = step_programs(points, 1, width, precision)
    scratch = empty(scratch_size(programs, LAYERS - 1, width, precision), dtype=DTYPES[precision])
    launch_network_step(empty(points, COORDINATES), _weights(width, LAYERS - 1, precision), empty(1, points, CHANNELS),
                        empty(1), empty(splits, 1, CHANNELS), _weights(width, LAYERS - 1, None, splits), scratch,
                        programs, precision=precision)  # fmt: skip


SMALL_POINTS, SMALL_LAYERS, SMALL_STEPS = 28 * 28, 3, 200
"""Whole fits that are looked at: digits, networks of three sine layers."""


def small_fits(
    precision: str, points: int = SMALL_POINTS, width: int = 32, steps: int = SMALL_STEPS, rounds: int = 4
) -> None:
    """Whole fits, so many for each program."""
    layout = Layout(COORDINATES, width, SMALL_LAYERS - 1, CHANNELS)
    programs = small_fits_programs(1 << 20, width, precision)
    networks = rounds * programs
    state = {name: empty(networks, layout.length) for name in ("parameters", "exp_avg", "exp_avg_sq")}
    integers = ("step", "adam_step", "rollbacks", "measured", "reason", "skipped")
    counters = {name: empty(networks, dtype=torch.int64) for name in integers}
    fits = Fits(**state, **counters, best=None, scale=empty(networks), loss_scale=empty(networks),
                best_mse=empty(networks, dtype=torch.float64), mse=empty(networks, steps + 1))  # fmt: skip
    gradients, scratch = small_fits_scratch(layout, programs, precision)
    launch_small_fits(empty(points, COORDINATES), empty(networks, points, CHANNELS), layout, fits,
                      empty(SMALL_LAYERS + 1), rows=empty(networks, dtype=torch.int64),
                      queue=empty(1, dtype=torch.int32), until=steps, learning_rates=empty(steps),
                      betas=(0.9, 0.999), eps=1e-8, check_every=10, guard=0.0, frozen=0,
                      target_mse=empty(networks, dtype=torch.float64), gradients=empty(gradients),
                      scratch=empty(scratch, dtype=DTYPES[precision]), programs=programs,
                      precision=precision)  # fmt: skip


ROW_CASES: dict[str, Callable[[str, int, int], None]] = {
    "forward": forward,
    "forward_first": forward_first,
    "input_gradient": input_gradient,
    "first_gradient": first_gradient,
    "weight_gradient": weight_gradient,
    "heads": heads,
    "network_forward": network_forward,
    "network_step": network_step,
    "small_fits": lambda precision, _, width: small_fits(precision, width=width),
}
"""How to call the kernel that rows of the table are for: precision, points, width."""

ONCE = ("small_fits",)
"""Kernels that a second launch finds with nothing left to do: `make tune` leaves their rows alone."""


def row_name(row: Row) -> str:
    """row/forward/hopper/half/64."""
    width = "any" if row.width == ANY else str(row.width)
    special = ["few"] if row.few else [f"{row.tiles.outputs}-columns"] if row.kernel == "heads" else []
    return "/".join(["row", row.kernel, row.generation, *row.precisions, width, *special])


def row_precisions(row: Row) -> tuple[str, ...]:
    """Those that a row is for."""
    return tuple(p for p in PRECISIONS if ("half" if BYTES[p] == 2 else p) in row.precisions)


def row_cases(table: tuple[Row, ...] = TABLE) -> list[Case]:
    """One case for each row: layers of the widest width it is for."""

    def case(row: Row) -> Case:
        points, width = FEW_POINTS if row.few else POINTS, min(row.width, WIDTH)
        call = ROW_CASES[row.kernel]
        if row.kernel == "heads":
            call = partial(heads, count=row.tiles.outputs // CHANNELS)
        return Case(
            row_name(row), lambda precision: call(precision, points, width), row_precisions(row), row.generation, row
        )

    return [case(row) for row in table if row.generation != "interpreter" and row.kernel in ROW_CASES]


def step(precision: str, network: Network | None = None, points: int = POINTS) -> None:
    """Losses, gradients and Adam of one step, as a fit does them."""
    network = network or Network(COORDINATES, (*[WIDTH] * LAYERS, CHANNELS), (1,) * (LAYERS + 1), (30.0,) * LAYERS)
    network = replace(network, precision=precision)
    pipeline = Pipeline(network, points, [True] * (2 * len(network.widths)), device="meta")
    groups, signals = pipeline.groups, pipeline.signals
    bad, counts = empty(groups, dtype=torch.int32), empty(groups, dtype=torch.int32)
    parameters, gradients, first_moments, second_moments = (empty(groups, pipeline.length) for _ in range(4))
    values = empty(signals, points, network.widths[-1])
    pipeline.launch(empty(points, COORDINATES), values, empty(signals), empty(signals), empty(signals), bad,
                    gradients=gradients)  # fmt: skip
    launch_adam(pipeline.table, parameters, gradients, first_moments, second_moments, counts, empty(groups), bad,
                pipeline.copies, pipeline.exact_copies, counts=(torch.empty_like(bad), torch.empty_like(bad)),
                precision=precision)  # fmt: skip


def large_step(precision: str) -> None:
    """An image of 512x512: waves."""
    step(precision, points=512 * 512)


def strainer_step(precision: str) -> None:
    """Pre-training: ten signals share the sine layers and have heads of their own."""
    step(precision, Network(COORDINATES, (*[WIDTH] * LAYERS, CHANNELS), (*[1] * LAYERS, 10), (30.0,) * LAYERS))


def stacked_step(precision: str) -> None:
    """Sixteen small networks at once."""
    step(precision, Network(COORDINATES, (64, 64, 64, CHANNELS), (16,) * 4, (30.0,) * 3), 64 * 64)


def rendering(precision: str, points: int = 2**20) -> None:
    """Values of the paper's network at so many points: whole on chip where it fits, else by layers."""
    network = Network(COORDINATES, (*[WIDTH] * LAYERS, CHANNELS), (1,) * (LAYERS + 1), (30.0,) * LAYERS, precision)
    pipeline = Pipeline(network, points, [False] * (2 * len(network.widths)), device="meta", values_only=True)
    pipeline.values(empty(points, COORDINATES), empty(1, points, CHANNELS))


def copies(precision: str) -> None:
    """Rounded copies of the weights, once before a fit."""
    network = Network(COORDINATES, (WIDTH, WIDTH, CHANNELS), (1, 1, 1), (30.0, 30.0), precision)
    pipeline = Pipeline(network, POINTS, [True] * 6, device="meta")
    launch_copies(pipeline.table, empty(1, pipeline.length), pipeline.copies, pipeline.exact_copies,
                  precision=precision)  # fmt: skip


def newton_schulz(precision: str) -> None:
    """Muon's products for the hidden layers' gradients."""
    x = empty(LAYERS - 1, WIDTH, WIDTH)
    scratch = empty(newton_schulz_scratch(tuple(x.shape), precision), dtype=DTYPES[precision])
    launch_newton_schulz(x, torch.empty_like(x), scratch, precision=precision)


def _flat(precision: str) -> tuple[Pipeline, Callable[[], Tensor], Callable[[], Tensor]]:
    """The paper's step, and what makes buffers [G, T] and counters [G] for it."""
    network = Network(COORDINATES, (*[WIDTH] * LAYERS, CHANNELS), (1,) * (LAYERS + 1), (30.0,) * LAYERS, precision)
    pipeline = Pipeline(network, POINTS, [True] * (2 * len(network.widths)), device="meta")
    groups = pipeline.groups
    return pipeline, lambda: empty(groups, pipeline.length), lambda: empty(groups, dtype=torch.int32)


def kfac(precision: str) -> None:
    """K-FAC's own launches of a step."""
    pipeline, buffer, counter = _flat(precision)
    joined = Joined(pipeline.table, torch.device("meta"))
    parameters, velocity, moved, rate, left = buffer(), buffer(), counter(), empty(1), empty(1)
    launch_settle(pipeline.table, joined, parameters, buffer(), buffer(), buffer(), velocity, empty(1), empty(1),
                  counter(), counter(), counter(), moved, empty(1), rate, left, growth=1.05, cut=0.5, smoothing=0.8,
                  factor=1.5)  # fmt: skip
    launch_kfac_update(pipeline.table, joined, parameters, velocity, buffer(), empty(1), rate, left, moved,
                       pipeline.copies, pipeline.exact_copies, momentum=(0.5, 0.95), precision=precision)  # fmt: skip


def muon(precision: str) -> None:
    """Muon's own launches of a step, but for Newton and Schulz's products."""
    pipeline, buffer, counter = _flat(precision)
    table, bad = pipeline.table, counter()
    stacks = Stacks(table, range(1, LAYERS), False, 1, torch.device("meta"))
    launch_momenta(table, stacks, buffer(), buffer(), bad, empty(stacks.size), keep=0.95)
    launch_muon_update(table, stacks, buffer(), empty(1), bad, empty(stacks.size), empty(len(table.segments)),
                       pipeline.copies, pipeline.exact_copies, precision=precision)  # fmt: skip
    launch_advance(counter(), bad, counter())


STEPS: tuple[Case, ...] = (
    Case("step", step),
    Case("step-512", large_step),
    Case("step-strainer", strainer_step),
    Case("step-stacked", stacked_step),
)
"""Training steps, whole: the first one is what roofline.py adds up."""

LONE: tuple[Case, ...] = tuple(
    Case(f"lone/{call.__name__}", call)
    for call in (forward_inference, forward_layer, forward_few_inputs, slope, weight_gradient_few_inputs, sincos,
                 copies, newton_schulz, weighted_heads, kfac, muon)
)  # fmt: skip
"""Kernels outside of steps, or as layers on their own launch them."""

CASES: list[Case] = [*row_cases(), *STEPS, *LONE]

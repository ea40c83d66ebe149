"""Whole fits of small networks, k steps in one launch: the GPU's side of the contract in docs/native.md.

A program takes a network from a queue, runs it to its next stop and takes the next one, without the host. Nothing is
shared between programs but the queue's counter, and all sums of a network run in one program in a fixed order: its bits
depend on its own state and data only.

    for each step
        for each tile of points: forward, sine and cosine of each layer to a scratch of the program's own; residuals;
                                 back, weight gradients added up in memory of the program's own
        the stop that is due: target, budget, guard, a loss that is not finite; else Adam on all parameters

Parameters and moments stay where they are, in the network's row of the state; with gradients and scratch they are some
70 KB a program at width 32, which the first two caches hold. Registers hold one tile's layer, not the network: the
number of layers is no constant, and nothing spills.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .checks import check_precision, check_same_device, check_tensor, launch_options, wrong
from .chip import current_chip
from .configs import FEW_INPUTS, supports, tiles_for
from .segments import DTYPES
from .small_fits_kernels import small_fits_kernel
from .tiles import Tiles

WARPS = 8
"""Of a multiprocessor at a time, in one program or two: its registers hold no more."""

MOST_CHANNELS = 16
"""Of a head: one narrow tile of the matrix unit."""

ALIGNED = 16
"""Rows of the state begin at multiples of so many numbers."""


@dataclass(frozen=True)
class Layout:
    """Where the parameters of a network lie in its row: weight [out, in] and bias [out] of each layer, in order."""

    inputs: int  # coordinates
    width: int  # of all sine layers
    hidden: int  # sine layers after the first
    channels: int

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Of the parameters."""
        widths = [self.inputs, *[self.width] * (self.hidden + 1), self.channels]
        return [shape for i in range(len(widths) - 1) for shape in ((widths[i + 1], widths[i]), (widths[i + 1],))]

    @property
    def offsets(self) -> list[int]:
        """Where each parameter begins, and where the last one ends."""
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        return ends

    @property
    def parameters(self) -> int:
        """Their number."""
        return self.offsets[-1]

    @property
    def length(self) -> int:
        """Of a row."""
        return -(-self.parameters // ALIGNED) * ALIGNED

    def views(self, flat: Tensor) -> list[Tensor]:
        """[N, *shape] of each parameter in flat [N, length]."""
        offsets = self.offsets
        return [flat[:, a : a + math.prod(s)].view(-1, *s) for a, s in zip(offsets, self.shapes, strict=False)]


def layout_of(parameters: Sequence[Tensor]) -> Layout:
    """Of stacked networks [N, out, in], [N, out], layer by layer.

    Raises ValueError for networks whose sine layers are not equally wide, or that have none.
    """
    layers = len(parameters) // 2
    first, head = parameters[0], parameters[-1]
    found = Layout(first.shape[-1], first.shape[-2], layers - 2, head.shape[-1])
    shapes = [tuple(p.shape[1:]) for p in parameters]
    if layers < 2 or shapes != found.shapes:
        raise wrong("parameters", "equally wide sine layers and a head", shapes, "Fit others step by step.")
    return found


def unfit(coordinates: int, width: int, num_layers: int, channels: int, precision: str) -> str | None:
    """Why this chip does not run whole fits of such networks (`num_layers` with the head); None where it does."""
    if num_layers < 2:
        return "networks without a sine layer"
    if coordinates > FEW_INPUTS:
        return f"{coordinates} coordinates, above {FEW_INPUTS}"
    if channels > MOST_CHANNELS:
        return f"{channels} channels, above {MOST_CHANNELS}"
    if not supports("small_fits", precision, width):
        return f"width {width} in {precision} does not fit a block"
    return None


def small_fits_programs(networks: int, width: int, precision: str) -> int:
    """Programs of a launch for so many networks: no more than run at a time."""
    each = max(1, WARPS // tiles_for("small_fits", precision, width).warps)
    return min(networks, each * current_chip().processors)


def small_fits_scratch(layout: Layout, programs: int, precision: str, tiles: Tiles | None = None) -> tuple[int, int]:
    """(float32 numbers for gradients, operands for activations) that a launch needs."""
    t = tiles or tiles_for("small_fits", precision, layout.width)
    return programs * 2 * layout.length, programs * (layout.hidden + 1) * 2 * t.points * _block(layout.width)


@dataclass(frozen=True, kw_only=True)
class Fits:
    """State of N fits, in place; the meanings are those of ops.fit_small.FitState."""

    parameters: Tensor  # [N, length], as Layout says; so are the next three
    exp_avg: Tensor
    exp_avg_sq: Tensor
    best: Tensor | None  # needed with a guard
    step: Tensor  # [N] int64, as all integers here
    adam_step: Tensor
    scale: Tensor  # [N] float32
    best_mse: Tensor  # [N] float64
    rollbacks: Tensor
    mse: Tensor  # [N, budget + 1] float32
    measured: Tensor
    reason: Tensor
    loss_scale: Tensor  # [N] float32, 1 at first
    skipped: Tensor  # steps without an update: gradients overflowed in half precision


def launch_small_fits(
    x: Tensor,  # [P, in] float32, contiguous
    values: Tensor,  # [N, P, C] float32, contiguous
    layout: Layout,
    fits: Fits,
    omegas: Tensor,  # [L] float32, the head's 1
    *,
    rows: Tensor,  # int64: the queue
    queue: Tensor,  # [1] int32, zero
    until: int,
    learning_rates: Tensor,  # [budget] float32
    betas: tuple[float, float],
    eps: float,
    check_every: int,
    target_mse: Tensor,  # [N] float64, negative for none
    guard: float,  # 0 for none
    frozen: int,  # layers
    gradients: Tensor,  # flat float32 and operands, `small_fits_scratch` of them
    scratch: Tensor,
    programs: int,
    precision: str = "fp32",
    tiles: Tiles | None = None,
) -> None:
    """Run the networks of the queue until they stop or reach step `until`; different rows only.

    Raises ValueError for tensors that do not belong together or a width without tiles (see `unfit`).
    """
    networks, points, channels = values.shape
    check_precision(precision)
    check_tensor("x", x, (points, layout.inputs), contiguous=True)
    check_tensor("values", values, (networks, points, layout.channels), contiguous=True)
    stacks = {"parameters": fits.parameters, "exp_avg": fits.exp_avg, "exp_avg_sq": fits.exp_avg_sq, "best": fits.best}
    for name, stack in stacks.items():
        if stack is not None:
            check_tensor(name, stack, (networks, layout.length), contiguous=True)
    for name in ("step", "adam_step", "rollbacks", "measured", "reason", "skipped"):
        check_tensor(name, getattr(fits, name), (networks,), (torch.int64,), contiguous=True)
    for name in ("scale", "loss_scale"):
        check_tensor(name, getattr(fits, name), (networks,), contiguous=True)
    check_tensor("best_mse", fits.best_mse, (networks,), (torch.float64,), contiguous=True)
    check_tensor("target_mse", target_mse, (networks,), (torch.float64,), contiguous=True)
    check_tensor("learning_rates", learning_rates, (None,), contiguous=True)
    check_tensor("mse", fits.mse, (networks, len(learning_rates) + 1), contiguous=True)
    check_tensor("omegas", omegas, (layout.hidden + 2,), contiguous=True)
    check_tensor("rows", rows, (None,), (torch.int64,), contiguous=True)
    check_tensor("queue", queue, (1,), (torch.int32,))
    check_same_device(x=x, values=values, state=fits.parameters, omegas=omegas, rows=rows, queue=queue,
                      gradients=gradients, scratch=scratch, mse=fits.mse, target_mse=target_mse)  # fmt: skip
    if channels > MOST_CHANNELS or layout.inputs > FEW_INPUTS:
        got = f"{channels} and {layout.inputs}"
        raise wrong("layout", f"at most {MOST_CHANNELS} channels and {FEW_INPUTS} coordinates", got, "Ask unfit.")
    t = tiles or tiles_for("small_fits", precision, layout.width)
    needed = small_fits_scratch(layout, programs, precision, t)
    if gradients.numel() < needed[0] or scratch.numel() < needed[1] or scratch.dtype != DTYPES[precision]:
        got = f"{gradients.numel()} and {scratch.numel()} of {scratch.dtype}"
        raise wrong("gradients and scratch", f"{needed[0]} and {needed[1]} of {DTYPES[precision]}", got,
                    "Ask small_fits_scratch.")  # fmt: skip
    if rows.numel() == 0:
        return
    count = points * channels
    # As plan.Plan: gradients stay in half precision's range however many residuals share them.
    shift = 2.0 ** round(math.log2(max(count, 1))) if DTYPES[precision] != torch.float32 else 1.0
    small_fits_kernel[(programs,)](
        x,
        values,
        fits.parameters,
        fits.exp_avg,
        fits.exp_avg_sq,
        fits.parameters if fits.best is None else fits.best,
        rows,
        queue,
        omegas,
        learning_rates,
        target_mse,
        fits.step,
        fits.adam_step,
        fits.scale,
        fits.best_mse,
        fits.rollbacks,
        fits.mse,
        fits.measured,
        fits.reason,
        fits.loss_scale,
        fits.skipped,
        gradients,
        scratch,
        rows.numel(),
        until,
        len(learning_rates),
        check_every,
        points,
        layout.hidden,
        channels,
        frozen,
        layout.offsets[2 * frozen],
        layout.parameters,
        layout.length,
        float(count),
        2.0 * shift / max(count, 1),
        1.0 / shift,
        float(guard),
        *map(float, betas),
        1.0 - betas[0],
        1.0 - betas[1],
        *(math.log(beta) if beta else -1e30 for beta in betas),
        float(eps),
        FIRST=layout.inputs,
        WIDTH=layout.width,
        BLOCK_P=t.points,
        BLOCK_C=16,
        BLOCK_H=_block(layout.width),
        CHUNK=min(t.inputs, _block(layout.width)),
        PRECISION=precision,
        TARGET=current_chip().target,
        **_options(t),
    )


def _options(t: Tiles) -> dict[str, int]:
    # Said outright, or the assembler spills to make room for a third program.
    return launch_options(t.warps, t.stages) | ({"maxnreg": 255} if current_chip().target == "cuda" else {})


def _block(width: int) -> int:
    size: int = max(16, triton.next_power_of_2(width))
    return size

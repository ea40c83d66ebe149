"""The table of tiles: every row runs and is right, and what chooses from it says no where it should."""

import pytest
import torch

from strainer_fast.kernels import configs, on_chip
from strainer_fast.kernels.chip import CHIPS, INTERPRETER, assume, current_chip
from strainer_fast.kernels.heads import launch_heads_loss
from strainer_fast.kernels.layers import (
    launch_first_gradient,
    launch_forward,
    launch_input_gradient,
    launch_weight_gradient,
)
from strainer_fast.kernels.segments import DTYPES
from strainer_fast.kernels.tiles import TABLE, Row, Tiles
from tests.kernels.guards import UNIT, Guards, relative
from tests.kernels.test_small_fits import gradient_error

pytestmark = pytest.mark.usefixtures("on_device")


def run(row: Row, precision: str) -> float:
    """Error by norm of the row's kernel with the row's tiles, on two tiles of points of its widest layer."""
    t, width, dtype = row.tiles, min(row.width, 40), DTYPES[precision]
    points, guards = t.points + 1, Guards()
    x, w = torch.randn(1, points, width), torch.randn(1, width, width) / width**0.5
    dz, b = torch.randn(1, points, width), torch.randn(1, width)
    operands = [a.to(dtype) for a in (x, w, dz)]
    exact = [a.double() for a in (x, w, dz, b)]
    if row.kernel == "forward":
        y = guards(1, points, width)
        launch_forward(operands[0], operands[1], b, y, omega=3.0, precision=precision, tiles=t)
        got, want = y, torch.sin(3.0 * (exact[0] @ exact[1].mT + exact[3].unsqueeze(1)))
    elif row.kernel == "forward_first":
        coords, first, y = torch.rand(points, 2), torch.randn(1, width, 2), guards(1, points, width)
        launch_forward(coords, first, b, y, omega=3.0, precision=precision, tiles=t)
        got, want = y, torch.sin(3.0 * (coords.double() @ first.double().mT + exact[3].unsqueeze(1)))
    elif row.kernel == "input_gradient":
        got = guards(1, points, width)
        launch_input_gradient(operands[2], operands[1], got, precision=precision, tiles=t)
        want = exact[2] @ exact[1]
    elif row.kernel == "first_gradient":
        coords, first = torch.rand(points, 2), (torch.randn(1, width, 2), torch.randn(1, width))
        blocks = 2
        got, db = guards(blocks, 1, width, 2), guards(blocks, 1, width)
        launch_first_gradient(operands[2], operands[1], coords, got, db, first=first, precision=precision, tiles=t)
        z = coords.double() @ first[0][0].double().T + first[1][0].double()
        dz1 = (exact[2] @ exact[1])[0] * z.cos()
        got, want = got.sum(0)[0], dz1.T @ coords.double()
        assert relative(db.sum((0, 1)), dz1.sum(0)) <= 8 * UNIT[precision] + 3e-6
    elif row.kernel == "weight_gradient":
        got = guards(1, 1, width, width)
        launch_weight_gradient(operands[2], operands[0], got, precision=precision, tiles=t)
        want = (exact[2].mT @ exact[0])[None]
    elif row.kernel == "heads":
        got = guards(2, 1, 3, width)
        head = (operands[1][:, :3], b[:, :3].contiguous(), torch.zeros(3, points, 1), torch.ones(3))
        launch_heads_loss(operands[0], *head, guards(2, 1, 3), dw=got, db=guards(2, 1, 3), precision=precision, tiles=t)
        prediction = exact[0] @ exact[1][:, :3].mT + exact[3][:, None, :3]
        got, want = got.sum(0), prediction.mT @ exact[0]
    elif row.kernel == "small_fits":
        return gradient_error(t, precision)
    else:
        return run_network(row, precision, guards)
    guards.check()
    return relative(got, want)


def run_network(row: Row, precision: str, guards: Guards) -> float:
    """The same of a network of one hidden layer, two networks at once."""
    width, points, dtype = 16, row.tiles.points + 1, DTYPES[precision]
    sizes = {"first_w": (width, 2), "first_b": (width,), "w": (width, width), "b": (width,),
             "head_w": (3, width), "head_b": (3,)}  # fmt: skip
    exact = {name: torch.randn(2, *size) / 3 for name, size in sizes.items()}
    kinds = {name: dtype if name in ("w", "head_w") else torch.float32 for name in sizes}
    weights = on_chip.Weights(*(exact[name].to(kinds[name]) for name in sizes), hidden=1, stride_w=0, stride_b=0)
    leaves = {name: t.double().requires_grad_() for name, t in exact.items()}
    x, values = torch.rand(points, 2), torch.rand(2, points, 3)
    h = torch.sin(x.double() @ leaves["first_w"].mT + leaves["first_b"].unsqueeze(1))
    h = torch.sin(h @ leaves["w"].mT + leaves["b"].unsqueeze(1))
    y = h @ leaves["head_w"].mT + leaves["head_b"].unsqueeze(1)
    if row.kernel == "network_forward":
        got = guards(2, points, 3)
        on_chip.launch_network_forward(x, weights, got, precision=precision, tiles=row.tiles)
        guards.check()
        return relative(got, y.detach())
    (0.5 * (y - values.double()).square().sum()).backward()
    gradients = {name: guards(2, 2, *size) for name, size in sizes.items()}
    sums, programs = guards(2, 2, 3), 3  # fewer than shares: one program does two
    scratch = torch.full((programs * 2 * 2 * row.tiles.points * 16,), torch.nan, dtype=dtype)
    partial = on_chip.Weights(*gradients.values(), hidden=1, stride_w=0, stride_b=0)
    on_chip.launch_network_step(x, weights, values, torch.ones(2), sums, partial, scratch, programs,
                                precision=precision, tiles=row.tiles)  # fmt: skip
    guards.check()
    errors = [relative(gradients[name].sum(0), leaves[name].grad) for name in sizes]
    return max(*errors, relative(sums.sum(0), (y - values.double()).square().sum(1).detach()))


def cases() -> list[object]:
    found = {}
    for row in TABLE:
        for precision in (p for p in DTYPES if ("half" if configs.BYTES[p] == 2 else p) in row.precisions):
            # The chip's name changes nothing here: rows that ask the same of a kernel are one case.
            found.setdefault((row.kernel, precision, row.width, row.tiles), (row, precision))
    return [
        pytest.param(*case, id=f"{case[0].kernel}-{case[1]}-{case[0].tiles.points}-{case[0].tiles.outputs}-"
                     f"{case[0].tiles.inputs}-width{case[0].width}-{case[0].tiles.warps}w{case[0].tiles.stages}s")
        for case in found.values()
        if case[0].generation != "interpreter"
    ]  # fmt: skip


@pytest.mark.parametrize(("row", "precision"), cases())
def test_every_row_is_right(row: Row, precision: str) -> None:
    assert run(row, precision) <= 8 * UNIT[precision] + 3e-6


@pytest.mark.parametrize("chip", [*CHIPS.values(), INTERPRETER], ids=lambda c: c.name)
def test_every_chip_has_tiles_for_every_layer(chip: object) -> None:
    for kernel in ("forward", "forward_first", "input_gradient", "first_gradient", "weight_gradient"):
        for precision in DTYPES:
            for width in (1, 33, 64, 100, 256, 4096):
                for few in (False, True):
                    assert configs.tiles_for(kernel, precision, width, few=few, chip=chip)


def test_choice_by_width_chip_and_few_points() -> None:
    hopper, ada = CHIPS["sm_90"], CHIPS["sm_89"]
    assert configs.tiles_for("forward", "fp16", 256, chip=hopper) == configs.tiles_for(
        "forward", "bf16", 300, chip=hopper
    )
    assert configs.tiles_for("forward", "fp16", 256, chip=hopper) != configs.tiles_for("forward", "fp16", 256, chip=ada)
    assert configs.tiles_for("forward", "fp16", 256, few=True, chip=hopper).points == 64
    assert configs.tiles_for("heads", "fp16", 256, columns=3, chip=hopper).outputs == 16
    assert configs.tiles_for("heads", "fp16", 256, columns=17, chip=hopper).outputs == 32
    assert configs.supports("network_forward", "fp16", 256, chip=hopper)
    assert not configs.supports("network_forward", "fp32", 256, chip=hopper)
    with pytest.raises(ValueError, match=r"network_step: expected a width of at most 32 in fp32 on sm_90, got 64"):
        configs.tiles_for("network_step", "fp32", 64, chip=hopper)


def test_assume_is_for_the_block_only() -> None:
    before = current_chip()
    with assume(CHIPS["gfx942"]):
        assert current_chip().target == "hip"
    assert current_chip() == before


@pytest.mark.parametrize(
    ("tiles", "message"),
    [
        (Tiles(48, 64, 64), "points: expected a power of two of at least 16, got 48"),
        (Tiles(8, 64, 64), "points"),
        (Tiles(128, 128, 64, 2), "warps and stages"),
        (Tiles(256, 256, 128, 8, 4), "shared memory: expected at most 232448 bytes"),
        (Tiles(128, 256, 32, 4, 2), "registers: expected at most 128 a thread for sums, got 256"),
    ],
)
def test_illegal_tiles(tiles: Tiles, message: str) -> None:
    assert message in configs.illegal(Row("forward", "hopper", ("half",), 256, tiles), CHIPS["sm_90"])

"""The optimiser's kernels against float64 PyTorch: Adam, sums of partial gradients, copies, skipped steps, Muon."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from strainer_fast.kernels.mm import PRECISIONS
from strainer_fast.kernels.newton_schulz import launch_newton_schulz, newton_schulz_scratch
from strainer_fast.kernels.optim import launch_adam, launch_advance, launch_copies, launch_reduce
from strainer_fast.kernels.segments import DTYPES, Segment, Table

UNIT = 2.0**-24  # half a unit in the last place of float32, relative


def model(groups: int, splits: int) -> list[Segment]:
    """A shared weight, a stacked one with its bias, a first layer, a frozen layer; padding, and gaps between all."""
    segments: list[Segment] = []
    ends = {"offset": 1, "partial": 3, "copies": 2, "bias_copies": 1}

    def place(name: str, size: int) -> int:
        first = ends[name]
        ends[name] += size + 3
        return first

    def add(count: int, rows: int, columns: int, pad: tuple[int, int], turned: bool = False, **more: Any) -> None:
        padded = groups * count * (rows + pad[0]) * (columns + pad[1])
        both: dict[str, Any] = {"partial_rows": rows + pad[0], "partial_columns": columns + pad[1]}
        both |= {"copy_rows": rows + pad[0], "copy_columns": columns + pad[1], "splits": splits} | more
        copies = "bias_copies" if more.get("exact") else "copies"
        both["offset"] = place("offset", count * rows * columns)
        both["partial"] = place("partial", both["splits"] * padded)
        both |= {"copy": place(copies, padded), "transposed": place(copies, padded) if turned else -1}
        segments.append(Segment(count, rows, columns, **both))

    add(1, 7, 2, (1, 0), exact=True, factor=0.5, omega=30.0)
    add(1, 7, 1, (1, 0), exact=True, splits=1, omega=30.0)
    add(2, 5, 7, (3, 1), turned=True, factor=2.0, omega=3.0)
    add(2, 5, 1, (3, 0), exact=True, factor=2.0)
    add(1, 6, 5, (0, 3), turned=True, trained=False, omega=5.0)
    add(1, 3, 6, (13, 10), factor=0.25)
    return segments


class State:
    """All buffers of a training, each in the middle of memory that nothing may touch."""

    def __init__(self, groups: int, splits: int, device: str, precision: str = "fp32", block: int | None = None):
        self.table = Table(model(groups, splits), groups, device, block)
        self.precision, self.device = precision, device
        self.generator = torch.Generator().manual_seed(0)
        self.memories: list[tuple[Tensor, Tensor]] = []
        shape = (groups, self.table.elements + 2)
        self.parameters = self.buffer(self.random(*shape))
        self.gradients, self.previous = (self.buffer(torch.full(shape, math.nan)) for _ in range(2))
        self.exp_avg, self.exp_avg_sq = (self.buffer(torch.zeros(shape)) for _ in range(2))
        self.step, self.bad, self.skipped = (self.buffer(torch.zeros(groups, dtype=torch.int32)) for _ in range(3))
        self.learning_rate = self.buffer(10.0 ** -torch.arange(2, 2 + groups))
        self.copies = self.buffer(torch.zeros(self.table.copies, dtype=DTYPES[precision]))
        self.bias_copies = self.buffer(torch.zeros(self.table.bias_copies))
        self.partials = self.buffer(torch.full((self.table.partials,), math.nan))

    def random(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * 2 - 1

    def buffer(self, values: Tensor) -> Tensor:
        fill = math.nan if values.is_floating_point() else -7
        memory = torch.full((values.numel() + 64,), fill, dtype=values.dtype, device=self.device)
        self.memories.append((memory, memory.clone()))
        inside = memory[32 : 32 + values.numel()].view(values.shape)
        return inside.copy_(values)

    def parts(self, segment: Segment) -> Tensor:
        """Where a segment's partial sums lie, without the padding: [S, G, count, rows, columns]."""
        padded = (segment.splits, self.table.groups, segment.count, segment.partial_rows, segment.partial_columns)
        view = self.partials[segment.partial : segment.partial + math.prod(padded)].view(padded)
        return view[..., : segment.rows, : segment.columns]

    def fill(self) -> None:
        """New partial sums. Those of one number share a sign, so that rounding errors are relative to the gradient."""
        for s in self.table.segments:
            where = self.parts(s)
            sign = self.random(*where.shape[1:]).sign()
            where.copy_(sign * (self.random(*where.shape) * 0.4 + 0.6))

    def of(self, buffer: Tensor, segment: Segment) -> Tensor:
        """A segment in a flat buffer: [G, count, rows, columns]."""
        inside = buffer[:, segment.offset : segment.offset + segment.size]
        return inside.reshape(-1, segment.count, segment.rows, segment.columns)

    def reduce(self) -> None:
        launch_reduce(self.table, self.partials, self.gradients, self.bad)

    def update(self, previous: bool = True, **options: float) -> None:
        launch_adam(
            *(self.table, self.parameters, self.gradients, self.exp_avg, self.exp_avg_sq, self.step),
            *(self.learning_rate, self.bad, self.copies, self.bias_copies, self.previous if previous else None),
            precision=self.precision,
            **options,
        )
        launch_advance(self.step, self.bad, self.skipped)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.fill()
            self.reduce()
            self.update()

    def buffers(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)}

    def check_guards(self) -> None:
        for memory, before in self.memories:
            assert same(memory[:32], before[:32])
            assert same(memory[-32:], before[-32:])


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, NaN equal to NaN."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


def rounded(x: Tensor, precision: str) -> Tensor:
    if precision == "tf32":  # 11 significant bits
        mantissa, exponent = torch.frexp(x.double())
        return torch.ldexp((mantissa * 2**11).round() / 2**11, exponent).float()
    return x.to(DTYPES[precision])


def check_copies(state: State) -> None:
    """Each number where it belongs, rounded to nearest, and zeros everywhere else."""
    wanted = {"copies": torch.zeros_like(state.copies), "bias_copies": torch.zeros_like(state.bias_copies)}
    for s in state.table.segments:
        scaled = (state.of(state.parameters, s) * s.omega).flatten(0, 1)
        buffer = wanted["bias_copies" if s.exact else "copies"]
        values = scaled if s.exact else rounded(scaled, state.precision)
        size = len(scaled) * s.copy_rows * s.copy_columns
        buffer[s.copy : s.copy + size].view(-1, s.copy_rows, s.copy_columns)[:, : s.rows, : s.columns] = values
        if s.transposed >= 0:
            turned = buffer[s.transposed : s.transposed + size].view(-1, s.copy_columns, s.copy_rows)
            turned[:, : s.columns, : s.rows] = values.mT
    assert torch.equal(state.copies, wanted["copies"])
    assert torch.equal(state.bias_copies, wanted["bias_copies"])


@pytest.mark.parametrize(("groups", "splits"), [(1, 1), (1, 6), (3, 3)])
def test_gradients_are_the_scaled_sums(groups: int, splits: int, device: str) -> None:
    state = State(groups, splits, device)
    state.fill()
    state.reduce()
    for s in state.table.segments:
        ours = state.of(state.gradients, s)
        if not s.trained:
            assert torch.equal(ours, torch.zeros_like(ours))
            continue
        exact = s.factor * state.parts(s).double().sum(0)
        # One rounding per addition and one for the factor; the terms have one sign.
        assert ((ours - exact).abs() <= s.splits * UNIT * exact.abs()).all()
    between = torch.ones(state.gradients.shape[1], dtype=torch.bool)
    for s in state.table.segments:
        between[s.offset : s.offset + s.size] = False
    assert state.gradients[:, between].isnan().all()
    assert not state.bad.any()
    state.check_guards()


@pytest.mark.parametrize(("groups", "splits"), [(1, 3), (3, 1)])
def test_adam_against_float64(groups: int, splits: int, device: str) -> None:
    state = State(groups, splits, device, block=64)  # several blocks in a segment
    steps, started = 4, [0, 9, 1000][:groups]
    state.step.copy_(torch.tensor(started))
    later = state.step[:, None] > 0
    state.exp_avg.copy_(torch.where(later, state.random(*state.exp_avg.shape).to(device), 0.0))
    state.exp_avg_sq.copy_(torch.where(later, state.random(*state.exp_avg.shape).to(device).square() + 0.5, 0.0))
    first = state.buffers()

    exact = []
    for g in range(groups):
        parameter = state.parameters[g].double().requires_grad_()
        adam = torch.optim.Adam([parameter], lr=float(state.learning_rate[g]), betas=(0.8, 0.99), eps=1e-6)
        adam.state[parameter] = {
            "step": torch.tensor(float(started[g])),
            "exp_avg": state.exp_avg[g].double(),
            "exp_avg_sq": state.exp_avg_sq[g].double(),
        }
        exact.append((parameter, adam))
    for _ in range(steps):
        state.fill()
        state.reduce()
        for g, (parameter, adam) in enumerate(exact):
            parameter.grad = torch.zeros_like(parameter)
            for s in state.table.segments:
                sums = s.factor * state.parts(s)[:, g].double().sum(0).flatten()
                parameter.grad[s.offset : s.offset + s.size] = sums if s.trained else 0.0
            adam.step()
        before = state.parameters.clone()
        state.update(beta1=0.8, beta2=0.99, eps=1e-6)

    # A step's size is a quotient of moments that are each right to some units in the last place, at most 16 in all;
    # moments of at most 2 lose as much in every step. The parameters round once a step.
    rate = state.learning_rate.double()[:, None]
    for s in (s for s in state.table.segments if s.trained):
        ends = slice(s.offset, s.offset + s.size)
        truth = {
            "parameters": torch.stack([p.detach()[ends] for p, _ in exact]),
            "exp_avg": torch.stack([adam.state[p]["exp_avg"][ends] for p, adam in exact]),
            "exp_avg_sq": torch.stack([adam.state[p]["exp_avg_sq"][ends] for p, adam in exact]),
        }
        limits = {"parameters": steps * UNIT * (truth["parameters"].abs() + 16 * rate), "exp_avg": 16 * steps * UNIT}
        for name, want in truth.items():
            assert ((getattr(state, name)[:, ends] - want).abs() <= limits.get(name, 16 * steps * UNIT)).all(), name
        assert not torch.equal(state.parameters[:, ends], first["parameters"][:, ends])
        assert torch.equal(state.previous[:, ends], before[:, ends])
    for s in (s for s in state.table.segments if not s.trained):
        ends = slice(s.offset, s.offset + s.size)
        for name in ("parameters", "exp_avg", "exp_avg_sq"):
            assert torch.equal(getattr(state, name)[:, ends], first[name][:, ends])
        assert torch.equal(state.previous[:, ends], before[:, ends])
    assert state.step.tolist() == [t + steps for t in started]
    assert not state.skipped.any()
    state.check_guards()


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 0.999, 0.9999])
def test_bias_correction(beta: float, device: str) -> None:
    """From zero moments p = -lr (1 - b1) / (1 - b1^t) / (sqrt((1 - b2) / (1 - b2^t))): each correction alone.

    In float32 1 - 0.999^1 would be wrong by 1e-5 of itself.
    """
    counts = [1, 2, 10, 1000, 100_000]
    table = Table([Segment(1, 1, 1, offset=0, partial=0, partial_rows=1, partial_columns=1)], len(counts), device)
    ones = torch.ones(len(counts), 1, device=device)
    step = torch.tensor(counts, dtype=torch.int32, device=device) - 1
    bad = torch.zeros_like(step)
    for betas in ((beta, 0.0), (0.0, beta)):
        parameter, m, v = (torch.zeros_like(ones) for _ in range(3))
        launch_adam(
            table, parameter, ones, m, v, step, ones[:, 0], bad, None, None, beta1=betas[0], beta2=betas[1], eps=0.0
        )
        for t, got in zip(counts, parameter[:, 0].tolist(), strict=True):
            rests = [-math.expm1(t * math.log(b)) if b else 1.0 for b in betas]
            want = -(1 - betas[0]) / rests[0] / math.sqrt((1 - betas[1]) / rests[1])
            assert abs(got - want) <= 6 * UNIT * abs(want)  # log(beta), its product with t and the quotients round


def test_a_gradient_that_is_not_finite_skips_its_group(device: str) -> None:
    state = State(3, 3, device)
    launch_copies(state.table, state.parameters, state.copies, state.bias_copies)
    state.train(1)
    before = state.buffers()
    state.fill()
    weight, bias = state.table.segments[2], state.table.segments[3]
    state.parts(weight)[1, 1, 1, 2, 3] = math.inf
    state.parts(bias)[2, 2, 0, 4, 0] = math.nan
    state.reduce()
    assert state.bad.tolist() == [0, 1, 1]
    state.update()
    assert state.step.tolist() == [2, 1, 1]
    assert state.skipped.tolist() == [0, 1, 1]
    assert state.bad.tolist() == [0, 0, 0]
    for name in ("parameters", "exp_avg", "exp_avg_sq", "previous"):
        assert same(getattr(state, name)[1:], before[name][1:]), name
    assert not same(state.parameters[0], before["parameters"][0])
    check_copies(state)
    # The same step of a model without the bad groups: the good one was not disturbed.
    good = State(3, 3, device)
    good.train(2)
    assert torch.equal(good.parameters[0], state.parameters[0])
    # The next step is an ordinary one again.
    state.train(1)
    assert state.step.tolist() == [3, 2, 2]
    assert state.parameters.isfinite().all()
    state.check_guards()


def test_a_sum_that_overflows_is_not_finite(device: str) -> None:
    state = State(1, 3, device)
    state.fill()
    state.parts(state.table.segments[0])[:, 0, 0, 6, 1] = 3e38
    with np.errstate(over="ignore"):  # the interpreter computes with numpy
        state.reduce()
    assert state.bad.tolist() == [1]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_copies(precision: str, device: str) -> None:
    state = State(2, 1, device, precision)
    launch_copies(state.table, state.parameters, state.copies, state.bias_copies, precision=precision)
    check_copies(state)
    state.train(1)
    check_copies(state)  # the frozen segment's copy is still that of the same weights
    state.check_guards()


@pytest.mark.parametrize("precision", ["tf32", "fp16", "bf16"])
def test_copies_round_to_nearest(precision: str, device: str) -> None:
    bits = {"tf32": 10, "fp16": 10, "bf16": 7}[precision]
    unit = 2.0**-bits
    values = torch.tensor([1 + 0.49 * unit, 1 + 0.51 * unit, -1 - 0.51 * unit, 2 - 0.49 * unit, 0.0], device=device)
    table = Table([Segment(1, 1, 5, 0, copy=0, copy_rows=1, copy_columns=5, trained=False)], 1, device)
    copies = torch.zeros(5, dtype=DTYPES[precision], device=device)
    launch_copies(table, values[None], copies, None, precision=precision)
    assert copies.tolist() == [1.0, 1 + unit, -1 - unit, 2.0, 0.0]


def test_same_bits_every_time_and_with_any_block(device: str) -> None:
    states = [State(2, 3, device, "fp16", block) for block in (None, None, 16)]
    for state in states:
        state.train(2)
    first, *others = (state.buffers() for state in states)
    assert all(same(first[name], other[name]) for other in others for name in first)


def test_previous_is_optional(device: str) -> None:
    ours, theirs = State(1, 1, device), State(1, 1, device)
    for state, previous in ((ours, False), (theirs, True)):
        state.fill()
        state.reduce()
        state.update(previous=previous)
    assert ours.previous.isnan().all()
    assert torch.equal(ours.parameters, theirs.parameters)


@pytest.mark.parametrize("groups", [0, 5, 2000])
def test_counting(groups: int, device: str) -> None:
    bad = (torch.arange(groups, dtype=torch.int32, device=device) % 3 == 1).int() * 5
    step, skipped = torch.arange(groups, dtype=torch.int32, device=device), torch.zeros_like(bad)
    launch_advance(step, bad.clone(), skipped)
    assert torch.equal(step, torch.arange(groups, device=device).int() + (bad == 0))
    assert torch.equal(skipped, (bad != 0).int())


PLAIN = Segment(1, 3, 2, offset=0, partial=0, partial_rows=3, partial_columns=2)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": 0}, "positive sizes"),
        ({"count": 2**30}, r"fewer than 2\^31"),
        ({"partial_columns": 1}, "partial_rows and partial_columns of at least 3 and 2"),
        ({"copy": 0, "copy_rows": 2, "copy_columns": 2}, "copy_rows and copy_columns of at least 3 and 2"),
        ({"partial": -1}, "partial >= 0, splits >= 1"),
        ({"factor": math.inf}, "a finite factor"),
        ({"exact": True, "transposed": 0, "copy_rows": 3, "copy_columns": 2}, "no transposed copy"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_segments_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=rf"^segments\[0\]: expected .*{match}.*got"):
        Table([dataclasses.replace(PLAIN, **change)], 1, "cpu")


def test_overlapping_segments_are_refused() -> None:
    with pytest.raises(ValueError, match="offset: expected the next segment at 6 or later, got 5"):
        Table([PLAIN, dataclasses.replace(PLAIN, offset=5, partial=6)], 1, "cpu")
    with pytest.raises(ValueError, match="partial: expected the next segment at 12 or later, got 6"):
        Table([PLAIN, dataclasses.replace(PLAIN, offset=6, partial=6)], 2, "cpu")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"parameters": lambda t: t.double()}, "parameters: expected torch.float32"),
        ({"gradients": lambda t: t[:, :-1].contiguous()}, r"gradients: expected shape \[2, T\]"),
        ({"exp_avg": lambda t: t.repeat(1, 2)[:, ::2]}, "exp_avg: expected a contiguous"),
        ({"previous": lambda t: t[:1]}, r"previous: expected shape \[2, \*\]"),
        ({"step": lambda t: t.long()}, "step: expected torch.int32"),
        ({"learning_rate": lambda t: t[:1]}, r"learning_rate: expected shape \[2\]"),
        ({"copies": lambda t: t.half()}, "copies: expected torch.float32"),
        ({"copies": lambda t: None}, "copies: expected a flat tensor of at least .* got None"),
        ({"bias_copies": lambda t: t[:-1]}, "bias_copies: expected a flat tensor of at least"),
        ({"parameters": lambda t: t.to("meta")}, "tensors: expected one device"),
        ({"precision": lambda t: "fp8"}, "precision: expected one of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unusable_buffers_are_refused(change: dict[str, Callable[[Any], Any]], match: str, device: str) -> None:
    state = State(2, 1, device)
    for name, function in change.items():
        setattr(state, name, function(getattr(state, name)))
    with pytest.raises(ValueError, match=f"^{match}"):
        state.update()
    with pytest.raises(ValueError, match=r"^beta2: expected a number in \[0, 1\), got 1"):
        State(2, 1, device).update(beta2=1.0)


def test_unusable_arguments_of_the_small_launchers_are_refused(device: str) -> None:
    state = State(2, 1, device)
    with pytest.raises(ValueError, match="partials: expected"):
        launch_reduce(state.table, state.partials[:-1], state.gradients, state.bad)
    with pytest.raises(ValueError, match="bad: expected"):
        launch_reduce(state.table, state.partials, state.gradients, state.bad[:1])
    with pytest.raises(ValueError, match="skipped: expected"):
        launch_advance(state.step, state.bad, state.skipped.long())
    x = torch.zeros(1, 3, 4, device=device)
    scratch = torch.zeros(newton_schulz_scratch(x.shape), device=device)
    for arguments, match in (
        ((x[0], x[0], scratch), "x: expected shape"),
        ((x, x.half(), scratch), "out: expected torch.float32"),
        ((x, x.mT, scratch), "out: expected shape"),
        ((x, x, scratch[:-1]), "scratch: expected a flat tensor"),
        ((x, x, scratch.half()), "scratch: expected torch.float32"),
    ):
        with pytest.raises(ValueError, match=f"^{match}"):
            launch_newton_schulz(*arguments)
    with pytest.raises(ValueError, match="coefficients, steps: expected"):
        launch_newton_schulz(x, x, scratch, steps=0)


COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(x: Tensor, steps: int) -> Tensor:
    a, b, c = COEFFICIENTS
    x = x.double()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def muon(x: Tensor, steps: int = 5, precision: str = "fp32", inplace: bool = False) -> Tensor:
    needed = newton_schulz_scratch(x.shape, precision)
    memories = [
        torch.full((x.numel() + 64,), math.nan, device=x.device),
        torch.full((needed + 64,), math.nan, dtype=DTYPES[precision], device=x.device),
    ]
    out, scratch = memories[0][32:-32].view(x.shape), memories[1][32:-32]
    if inplace:
        x = out.copy_(x)
    launch_newton_schulz(x, out, scratch, steps=steps, precision=precision)
    assert all(memory[:32].isnan().all() and memory[-32:].isnan().all() for memory in memories)
    return out


@pytest.mark.parametrize("shape", [(1, 33, 20), (3, 20, 33), (3, 16, 16), (1, 1, 70), (1, 130, 9)], ids=str)
def test_newton_schulz_against_float64(shape: tuple[int, int, int], device: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device) * 100
    ours, exact = muon(x), orthogonalise(x, 5)
    assert (ours - exact).abs().max() <= 64 * UNIT  # values of at most about 1, through 15 products
    # The iteration does not settle at 1 but within [0.68, 1.2], all but the smallest singular values.
    values = torch.linalg.svdvals(ours)
    small = torch.linalg.svdvals(x / x.norm(dim=(1, 2), keepdim=True)) < 0.01
    assert ((values > 0.65) | small).all()
    assert (values < 1.25).all()


@pytest.mark.parametrize("steps", [1, 2])
def test_newton_schulz_ends_in_out_and_may_begin_there(steps: int, device: str) -> None:
    x = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    ours = muon(x, steps)
    assert (ours - orthogonalise(x, steps)).abs().max() <= 64 * UNIT
    assert torch.equal(muon(x, steps, inplace=True), ours)


def test_newton_schulz_large_norms_and_zeros(device: str) -> None:
    x = torch.randn(3, 66, 65, generator=torch.Generator().manual_seed(0)).to(device)  # two blocks of squares
    x[1] = 0
    ours = muon(x, 1)
    assert torch.equal(ours[1], torch.zeros_like(ours[1]))
    assert (ours - orthogonalise(x, 1)).abs().max() <= 64 * UNIT


@pytest.mark.parametrize(
    ("precision", "unit"), [("tf32x3", 2.0**-21), ("tf32", 2.0**-11), ("fp16", 2.0**-11), ("bf16", 2.0**-8)]
)
def test_newton_schulz_in_lower_precision(precision: str, unit: float, device: str) -> None:
    x = torch.randn(1, 20, 33, generator=torch.Generator().manual_seed(0)).to(device)
    error = (muon(x, precision=precision) - orthogonalise(x, 5)).norm() / 20**0.5
    assert UNIT * 10 < error <= 8 * unit  # operands are rounded, and the slope at small values is a^5


def test_newton_schulz_as_torch_does_it(device: str) -> None:
    module = pytest.importorskip("torch.optim._muon", reason="this PyTorch has no Muon")
    theirs = getattr(module, "_zeropower_via_newtonschulz", None)
    if theirs is None:
        pytest.skip("this PyTorch's Muon has no function of its own for it")
    x = torch.randn(1, 33, 20, generator=torch.Generator().manual_seed(0)).to(device)
    want, exact = theirs(x[0], COEFFICIENTS, 5, 1e-7).double(), orthogonalise(x, 5)[0]
    # PyTorch keeps everything in bfloat16: both are as far from float64, and no further from each other.
    ours = muon(x, precision="bf16")[0]
    assert (ours - exact).norm() <= 1.25 * (want - exact).norm()
    assert (want - ours).norm() <= 1.5 * (want - exact).norm() <= 0.05 * exact.norm()

"""A model of how long a training step takes on a GPU: its real launches, counted, against stated ceilings.

Nothing here is measured. It says what bounds each kernel and what a change of design could win; `make bench-gpu`
says what is true. Launches come from capture.py, so shapes, tiles and their number are those of the real step.

    python -m strainer_fast.kernels.roofline --chip sm_90 --precision fp16 [--points 31684]
"""

import argparse
import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from .capture import Launch, capture
from .cases import CHANNELS, LAYERS, POINTS, WIDTH, rendering, step
from .chip import CHIPS, Chip
from .mm import PRECISIONS
from .sine_linear import COSINE


@dataclass(frozen=True)
class Peaks:
    """What a chip can do, from its data sheet: dense, sums in float32; TFLOP/s, TB/s, MB, GHz."""

    half: float
    tf32: float
    fp32: float
    memory: float
    l2: float
    l2_size: float
    clock: float


PEAKS = {
    "sm_80": Peaks(312, 156, 19.5, 2.04, 4.5, 40, 1.41),  # A100 80 GB
    "sm_86": Peaks(155, 77, 38.7, 0.77, 2.0, 6, 1.80),  # A6000
    "sm_89": Peaks(165, 83, 82.6, 1.01, 4.0, 72, 2.52),  # RTX 4090
    "sm_90": Peaks(989, 495, 66.9, 3.35, 5.5, 50, 1.76),  # H100 SXM
    "sm_100": Peaks(2250, 1125, 75.0, 8.0, 10.0, 126, 1.85),  # B200
    "sm_120": Peaks(210, 105, 104.8, 1.79, 6.0, 96, 2.41),  # RTX 5090
    "gfx942": Peaks(1307, 654, 163.4, 5.3, 10.0, 256, 2.10),  # MI300X, its last-level cache
}

MATRIX_SHARE, VECTOR_SHARE, MEMORY_SHARE, L2_SHARE = 0.8, 0.7, 0.9, 0.5
"""Achievable: of the matrix unit's and the vector unit's peak, of memory's; of the cache that holds what is reused."""

LAUNCH = 2.0e-6
"""Seconds from the end of a kernel's work to the next one's under a CUDA graph: draining, starting, filling."""

SATURATES = 0.25
"""Share of the multiprocessors whose loads together take all bandwidth."""

LANES, SPECIAL_LANES = 128, 16
"""Instructions a clock and multiprocessor: of the vector unit, of the special-function unit."""

SINE_SLOTS = {"sine": 7, "both": 8}  # range reduction and special-function unit
POLYNOMIAL_SLOTS = {"sine": 12, "both": 17}
STORE_SLOTS = 6
"""Per element of a result: bias, rounding, address, store."""

PAGE = 1 << 18
"""Bytes by which the cache is followed."""


@dataclass
class Work:
    """What a launch has to do."""

    product: float = 0.0  # FLOPs of the matrix unit
    thin: float = 0.0  # FLOPs of the vector unit
    slots: float = 0.0  # other instructions of the vector unit, per lane
    special: float = 0.0  # of the special-function unit
    cache: float = 0.0  # bytes between L2 and multiprocessors
    reads: tuple[Tensor, ...] = ()
    writes: tuple[Tensor, ...] = ()

    def sines(self, count: float, both: bool, precision: str, chip: Chip) -> None:
        """Add so many sines, or sines with cosines."""
        which = "both" if both else "sine"
        if precision in ("fp32", "tf32x3") or chip.target == "hip":
            self.slots += count * POLYNOMIAL_SLOTS[which]
        else:
            self.slots += count * SINE_SLOTS[which]
            self.special += count * (2 if both else 1)


def size(tensor: Tensor) -> int:
    """Bytes in memory: an expanded axis is there once."""
    return tensor.element_size() * math.prod(n for n, s in zip(tensor.shape, tensor.stride(), strict=True) if s)


def _product(work: Work, flops: float, precision: str) -> None:
    if precision == "fp32":
        work.thin += flops
    else:
        work.product += flops


def forward_work(launch: Launch) -> Work:
    """Of sine_linear.forward_kernel."""
    a, c, work = launch.arguments, launch.constants, Work()
    rows, inputs, outputs, networks = a["rows_y"], a["inputs"], a["outputs"], launch.grid[1]
    columns = math.ceil(outputs / c["BLOCK_O"])
    blocks = launch.grid[0] // columns
    elements = networks * rows * outputs
    x, w, y = a["x_ptr"], a["w_ptr"], a["y_ptr"]
    saved = [a["saved_ptr"]] if c["SAVE"] else []
    if c["FEW"]:
        work.thin += 2 * elements * inputs
    else:
        _product(work, 2 * elements * inputs, c["PRECISION"])
    if c["SINE"]:
        work.sines(elements, c["SAVE"] == COSINE.value, c["PRECISION"], launch.chip)
    work.slots += elements * STORE_SLOTS * (1 + len(saved))
    work.cache = size(x) * columns + size(w) * blocks + size(y) * (1 + len(saved))
    work.reads, work.writes = (x, w), (y, *saved)
    return work


def forward_chain_work(launch: Launch) -> Work:
    """Of sine_linear.forward_chain_kernel: a layer's input comes from the caches, its weights once for every block."""
    a, c, work = launch.arguments, launch.constants, Work()
    h, w, kept = a["h_ptr"], a["w_ptr"], a["c_ptr"]
    width, layers, blocks = c["WIDTH"], a["layers"], launch.grid[0]
    first = h[0].numel()  # elements of a layer
    saves = bool(c["SAVE"])
    work.thin = 2 * first * c["FEW"]
    _product(work, 2 * layers * first * width, c["PRECISION"])
    work.sines(first, False, c["PRECISION"], launch.chip)
    work.sines(layers * first, saves, c["PRECISION"], launch.chip)
    work.slots += first * STORE_SLOTS * (1 + layers * (1 + saves))
    # Written: h, and c where it is kept; read: h but the last.
    work.cache = size(h) + layers * size(h[0]) + (size(kept) if saves else 0) + size(w) * blocks
    work.reads, work.writes = (a["x_ptr"], w), (h, *([kept] if saves else []))
    return work


def input_gradient_work(launch: Launch) -> Work:
    """Of sine_linear.input_gradient_kernel and first_gradient_kernel, which writes weight gradients instead of dz."""
    a, c, work = launch.arguments, launch.constants, Work()
    rows, inputs, outputs, networks = a["rows_d"], a["inputs"], a["outputs"], launch.grid[1]
    columns = math.ceil(inputs / c["BLOCK_K"])
    blocks = launch.grid[0] // columns
    elements = networks * rows * inputs
    dz, w, dx = a["dz_ptr"], a["w_ptr"], a["dx_ptr" if "dx_ptr" in a else "dw_ptr"]
    _product(work, 2 * elements * outputs * a["summed"], c["PRECISION"])
    if c["FIRST"]:
        work.sines(elements, False, c["PRECISION"], launch.chip)
        work.slots += elements * c["FIRST"]
    cosine = [a["cosine_ptr"]] if c.get("HAS_COSINE") else []
    work.slots += elements * (STORE_SLOTS if "dx_ptr" in a else 1 + c["FIRST"])
    work.cache = size(dz) * columns + size(w) * blocks + size(dx) * (1 + len(cosine))
    work.reads, work.writes = (dz, w, *cosine), (dx,)
    return work


def gradient_chain_work(launch: Launch) -> Work:
    """Of sine_linear_backward.gradient_chain_kernel."""
    a, c, work = launch.arguments, launch.constants, Work()
    dz, w, kept, blocks = a["dz_ptr"], a["w_ptr"], a["c_ptr"], launch.grid[0]
    steps, elements = a["layers"] - 1, dz[0].numel()
    _product(work, 2 * steps * elements * c["WIDTH"], c["PRECISION"])
    work.slots = steps * elements * STORE_SLOTS
    # Read: dz, weights and the cosine of the layer before; written: dz.
    work.cache = steps * (2 * size(dz[0]) + size(kept[0]) + size(w[0]) * blocks)
    work.reads, work.writes = (dz[-1], w[1:], kept[:-1]), (dz[:-1],)
    return work


def weight_gradient_work(launch: Launch) -> Work:
    """Of sine_linear.weight_gradient_kernel."""
    a, c, work = launch.arguments, launch.constants, Work()
    outs, ins, _ = launch.grid
    rows, inputs, outputs = a["rows_d"], a["inputs"], a["outputs"]
    networks = launch.grid[2] // a["splits"]  # of all layers
    dz, x, dw = a["dz_ptr"], a["x_ptr"], a["dw_ptr"]
    flops = 2 * networks * rows * inputs * outputs
    if c["FEW"]:
        work.thin += flops
    else:
        _product(work, flops, c["PRECISION"])
    work.slots += networks * rows * outputs * ins if c["HAS_BIAS"] else 0
    work.cache = size(dz) * ins + size(x) * outs + size(dw) * (2 if c["ADD"] else 1)
    work.reads, work.writes = (dz, x, *([dw] if c["ADD"] else [])), (dw,)
    return work


def heads_work(launch: Launch) -> Work:
    """Of heads.heads_kernel: predictions, dz and weight gradients are three products."""
    a, c, work = launch.arguments, launch.constants, Work()
    h, w, dz, dw, target = a["h_ptr"], a["w_ptr"], a["dz_ptr"], a["dw_ptr"], a["target_ptr"]
    products = 1 + c["WANT_DZ"] + c["WANT_DW"]
    # A product narrower than the matrix unit's tile costs the whole tile.
    columns = max(w.shape[1], c["BLOCK_C"])
    _product(work, 2 * products * h.shape[0] * h.shape[1] * h.shape[2] * columns, c["PRECISION"])
    work.slots += h.numel() * STORE_SLOTS
    extra = [a["cosine_ptr"]] if c["WANT_DZ"] else []
    written = [*([dz] if c["WANT_DZ"] else []), *([dw] if c["WANT_DW"] else [])]
    work.reads, work.writes = (h, w, target, *extra), tuple(written)
    work.cache = sum(map(size, (h, target, *extra, *written))) + size(w) * launch.grid[0]
    return work


def network_work(launch: Launch) -> Work:
    """Of network.network_forward_kernel and network_step_kernel, whose activations never leave the caches."""
    a, c, work = launch.arguments, launch.constants, Work()
    training, width, hidden = "scratch_ptr" in a, c["BLOCK_H"], a["hidden"]
    networks = a["networks"] if training else launch.grid[1]
    elements = networks * a["points"] * width
    products = 3 if training else 1
    _product(work, 2 * products * elements * (hidden * width + c["BLOCK_C"]), c["PRECISION"])
    work.sines(elements * (hidden + 1), training, c["PRECISION"], launch.chip)
    work.slots += elements * (c["FIRST"] + STORE_SLOTS * (1 + hidden) * (3 if training else 1))
    tiles = networks * math.ceil(a["points"] / c["BLOCK_P"])
    weights = hidden * width * width * a["w_ptr"].element_size()
    work.cache = tiles * weights * (2 if training else 1)
    work.reads = tuple(a[name] for name in ("x_ptr", "w_ptr", "head_w_ptr"))
    if training:
        # Each tile reads and writes the sums of its share, and h and the cosine of every layer.
        work.cache += tiles * hidden * width * width * 8 + 4 * elements * (hidden + 1) * a["scratch_ptr"].element_size()
        work.reads, work.writes = (*work.reads, a["target_ptr"]), (a["dw_ptr"], a["head_dw_ptr"], a["scratch_ptr"])
    else:
        work.writes = (a["y_ptr"],)
    return work


def other_work(launch: Launch, both: tuple[str, ...] = ()) -> Work:
    """Of a kernel that only moves memory: each tensor once, those named read and written."""
    tensors = launch.tensors
    elements = max((t.numel() for t in tensors.values()), default=0)
    read = tuple(tensors.values())
    written = tuple(t for name, t in tensors.items() if name in both)
    return Work(slots=elements * STORE_SLOTS, cache=sum(map(size, (*read, *written))), reads=read, writes=written)


WORK: dict[str, Callable[[Launch], Work]] = {
    "forward_kernel": forward_work,
    "forward_chain_kernel": forward_chain_work,
    "gradient_chain_kernel": gradient_chain_work,
    "input_gradient_kernel": input_gradient_work,
    "first_gradient_kernel": input_gradient_work,
    "weight_gradient_kernel": weight_gradient_work,
    "heads_kernel": heads_work,
    "network_forward_kernel": network_work,
    "network_step_kernel": network_work,
    "_adam_kernel": partial(other_work, both=("parameters_ptr", "exp_avg_ptr", "exp_avg_sq_ptr")),
}
"""How to count a kernel's work; others move each of their tensors once."""


class Cache:
    """L2 as the least recently used pages; what leaves it changed is written to memory."""

    def __init__(self, capacity: float) -> None:
        self.capacity, self.pages = capacity / PAGE, OrderedDict[tuple[int, int], bool]()

    def touch(self, tensor: Tensor, write: bool) -> float:
        """Bytes that memory has to move for it."""
        moved, total = 0.0, size(tensor)
        if not total:
            return 0.0
        start = tensor.storage_offset() * tensor.element_size()
        storage = tensor.untyped_storage()._cdata
        for page in range(start // PAGE, (start + total - 1) // PAGE + 1):
            share = min(total, PAGE)
            changed = self.pages.pop((storage, page), None)
            if changed is None and not write:
                moved += share
            self.pages[storage, page] = write or bool(changed)
            if len(self.pages) > self.capacity and self.pages.popitem(last=False)[1]:
                moved += PAGE
        return moved


@dataclass(frozen=True)
class Time:
    """Of a launch, in seconds, by what could bound it."""

    name: str
    programs: int
    terms: dict[str, float]

    @property
    def total(self) -> float:
        """The slowest of them, and the launch."""
        return max(self.terms.values()) + LAUNCH

    @property
    def bound(self) -> str:
        """Which one that is."""
        return max(self.terms, key=lambda term: self.terms[term])


def step_times(launches: list[Launch], chip: Chip) -> list[Time]:
    """Of each launch of a step, in a loop of steps: what the one before left in L2 is found there."""
    cache, times = Cache(L2_SHARE * 1e6 * PEAKS[chip.name].l2_size), list[Time]()
    for _ in range(2):
        times = [_time(launch, chip, cache) for launch in launches]
    return times


def _time(launch: Launch, chip: Chip, cache: Cache) -> Time:
    return time_of(launch, WORK.get(launch.name, other_work)(launch), chip, cache)


def time_of(launch: Launch, work: Work, chip: Chip, cache: Cache) -> Time:
    """Of a launch that has to do this."""
    peaks = PEAKS[chip.name]
    programs = math.prod(launch.grid)
    memory = sum(cache.touch(t, False) for t in work.reads) + sum(cache.touch(t, True) for t in work.writes)
    # Programs come in rounds of one per processor; the last round is rarely full.
    rounds = math.ceil(programs / chip.processors) * chip.processors / programs
    spread = min(1.0, programs / (SATURATES * chip.processors))
    precision = launch.constants.get("PRECISION", "fp32")
    matrix = peaks.tf32 if precision in ("tf32", "tf32x3") else peaks.half
    product, thin = work.product, work.thin
    if precision == "tf32x3":  # three products for one; fp32 elsewhere than on NVIDIA
        product, thin = (3 * product, thin) if chip.target == "cuda" else (0.0, thin + product)
    lanes = chip.processors * peaks.clock * 1e9
    terms = {
        "matrix": rounds * product / (MATRIX_SHARE * matrix * 1e12),
        "vector": rounds * (thin / (VECTOR_SHARE * peaks.fp32 * 1e12) + work.slots / (lanes * LANES)),
        "special": rounds * work.special / (lanes * SPECIAL_LANES),
        "memory": memory / (spread * MEMORY_SHARE * peaks.memory * 1e12),
        "L2": work.cache / (spread * peaks.l2 * 1e12),
    }
    return Time(launch.role, programs, terms)


def launches_of(chip: Chip, precision: str, points: int) -> list[Launch]:
    """Those of a training step."""
    with capture(chip) as launches:
        step(precision, points=points)
    return launches


def summary(chips: list[Chip], precisions: list[str], points: tuple[int, ...] = (POINTS, 512 * 512)) -> str:
    """Microseconds and steps a second, as a Markdown table."""
    columns = [f"{p:,} points: us | it/s | launches" for p in points]
    lines = [f"| chip | precision | {' | '.join(columns)} |", "|---" * (2 + 3 * len(points)) + "|"]
    for chip in chips:
        for precision in precisions:
            cells = [chip.name, precision]
            for count in points:
                times = step_times(launches_of(chip, precision, count), chip)
                total = sum(t.total for t in times)
                cells += [f"{total * 1e6:,.0f}", f"{1 / total:,.0f}", str(len(times))]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def details(chip: Chip, precision: str, points: int = POINTS) -> str:
    """Every launch of a step, as a Markdown table; microseconds."""
    times = step_times(launches_of(chip, precision, points), chip)
    terms = list(times[0].terms)
    lines = [f"| kernel | programs | {' | '.join(terms)} | bound | with launch |", "|---" * (4 + len(terms)) + "|"]
    for t in times:
        numbers = " | ".join(f"{t.terms[term] * 1e6:.1f}" for term in terms)
        lines.append(f"| {t.name} | {t.programs} | {numbers} | {t.bound} | {t.total * 1e6:.1f} |")
    total = sum(t.total for t in times)
    lines.append(f"| sum |{' |' * (2 + len(terms))} {total * 1e6:.1f} = {1 / total:,.0f} it/s |")
    return "\n".join(lines) + "\n"


def rendering_summary(chips: list[Chip], precisions: list[str], points: int = 2**20) -> str:
    """Milliseconds that rendering so many points takes, as a Markdown table."""
    lines = [
        f"Values at {points:,} points, {LAYERS} sine layers of {WIDTH}, {CHANNELS} channels:\n",
        "| chip | precision | ms | launches | of which |",
        "|---|---|---|---|---|",
    ]
    for chip in chips:
        for precision in precisions:
            with capture(chip) as launches:
                rendering(precision, points)
            times = step_times(launches, chip)
            names = ", ".join(dict.fromkeys(t.name for t in times))
            total = 1e3 * sum(t.total for t in times)
            lines.append(f"| {chip.name} | {precision} | {total:.2f} | {len(times)} | {names} |")
    return "\n".join(lines) + "\n"


def assumptions(chips: list[Chip]) -> str:
    """What the numbers rest on."""
    lines = [
        "Model, not measurement: a launch takes as long as the slowest of matrix products "
        f"({MATRIX_SHARE:.0%} of peak; one of tf32x3 is three of tf32, splitting its operands is not counted), vector "
        f"instructions ({VECTOR_SHARE:.0%} of peak for multiply-adds, {LANES} "
        f"lanes a clock for the rest: {SINE_SLOTS['sine']} a sine, {SINE_SLOTS['both']} with its cosine, "
        f"{STORE_SLOTS} an element stored), sines of the special-function unit ({SPECIAL_LANES} lanes a clock), memory "
        f"({MEMORY_SHARE:.0%} of peak) and L2, plus {LAUNCH * 1e6:.1f} us under a CUDA graph. {L2_SHARE:.0%} of L2 "
        "keeps what was used last. The last round of programs may leave processors idle; "
        f"{SATURATES:.0%} of the processors take all bandwidth.\n",
        "| chip | half | tf32 | fp32 TFLOP/s | memory | L2 TB/s | L2 MB | GHz |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for chip in chips:
        p = PEAKS[chip.name]
        values = (chip.name, p.half, p.tf32, p.fp32, p.memory, p.l2, p.l2_size, p.clock)
        lines.append(f"| {' | '.join(map(str, values))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m strainer_fast.kernels.roofline", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--chip", nargs="+", choices=sorted(CHIPS), default=["sm_80", "sm_90"])
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp16", "tf32", "fp32"])
    parser.add_argument("--points", type=int, default=POINTS)
    parser.add_argument("--render", action="store_true", help="rendering of 2^20 points instead of a step")
    options = parser.parse_args(arguments)
    chips = [CHIPS[name] for name in options.chip]
    try:
        print(assumptions(chips))
        if options.render:
            print(rendering_summary(chips, options.precision))
            return 0
        print(summary(chips, options.precision, (options.points,)))
        for chip in chips:
            for precision in options.precision:
                print(f"### {chip.name} {precision}\n\n{details(chip, precision, options.points)}")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What fits and pre-training share: environment of a run, memory needed, differences between two runs."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from strainer_fast._checks import bad_input
from strainer_fast.kernels import cpu
from strainer_fast.models import Architecture
from strainer_fast.ops.dispatch import triton_version
from strainer_fast.ops.tiled import MIN_TILE, TILE_ELEMENTS
from strainer_fast.signals import Signal

CHUNK = 2**15
"""Points evaluated at once, about: rendering, measuring and features need memory for these, not for all activations."""


def environment(
    implementation: str, device: torch.device, whole_fits: bool = False, precision: str = "fp32"
) -> dict[str, Any]:
    """What two runs must share to give the same bits; `whole_fits` says whether `ops.fit_small` runs some of them."""
    level = f" ({cpu.level()})" if implementation == "native" else ""
    if implementation == "triton":
        level = f" ({precision})"
        level += ", whole fits on chip" if whole_fits else ""
    elif whole_fits and implementation != "native":
        level = f", whole fits native ({cpu.level()})"
    return {
        "implementation": implementation + level,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        **_gpu(device),
    }


def _gpu(device: torch.device) -> dict[str, str]:
    """What decides tiles, and so bits, on a GPU."""
    if device.type != "cuda":
        return {}
    has = torch.cuda.get_device_properties(device)
    return {"gpu": f"{has.name}, {has.multi_processor_count} processors", "triton": triton_version() or "none"}


@contextmanager
def neutral() -> Iterator[None]:
    """Within, the caller's modes, defaults and random state change nothing, nor are they changed."""
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        if torch.get_default_device().type != "cpu":  # the context costs every call a detour through Python
            stack.enter_context(torch.device("cpu"))
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        torch.set_float32_matmul_precision("highest")
        yield


@contextmanager
def one_thread() -> Iterator[None]:
    """Within, PyTorch's calls run on one thread: those on a small network are over before another one has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def step_bytes(
    implementation: str, points: int, channels: int, num_signals: int, shared: bool, network: Architecture
) -> int:
    """Memory of one step, about: data, parameters with optimiser state and gradients, activations.

    `shared` says whether the signals share an encoder (pre-training) or are independent networks.
    """
    width, depth = network.hidden_features, network.num_layers
    data = 2 * points * (2 + num_signals * channels)
    own = (depth - network.num_shared_layers - 1) if shared else depth - 1
    parameters = width * width * ((depth - 1 - own) + own * num_signals) + width * channels * num_signals
    layers = (depth - 1 - own) + own * num_signals
    if implementation == "native":  # every thread has gradients of its own; a tile is smaller still
        parameters += parameters * torch.get_num_threads() // 7
    if implementation == "triton":  # a wave of points; sines and cosines of every layer, two gradients
        from strainer_fast.kernels.plan import WAVE_ELEMENTS

        stack = 1 if shared else num_signals
        points = min(points, WAVE_ELEMENTS // (width * max(stack, 1)) + 128)
    elif implementation != "torch":
        points = min(points, 2 * TILE_ELEMENTS // width + MIN_TILE)
        layers = min(layers, depth * max(1, TILE_ELEMENTS // (width * max(points, 1))))
    # Sine inputs and outputs of every layer, and a few temporaries.
    activations = points * width * (2 * layers + 4)
    return 4 * (data + 7 * parameters + activations)


def check_memory(
    implementation: str,
    signal: Signal,
    num_signals: int,
    shared: bool,
    architecture: Architecture,
    device: torch.device,
    num_frozen: int = 0,
) -> None:
    """Refuse a signal whose step cannot fit, before anything starts: the system would kill the process.

    Raises InputError.
    """
    points = signal.samples().shape[0]
    needed = step_bytes(implementation, points, signal.channels, num_signals, shared, architecture)
    if num_frozen:  # their features are kept for all points
        needed += 4 * points * architecture.hidden_features
    available = available_bytes(device)
    if available is not None and needed > available:
        other = "Use implementation='tiled', a" if implementation == "torch" else "Use a"
        raise bad_input(
            f"signal {signal.name!r} of {'x'.join(map(str, signal.shape))} points",
            f"a step that fits into {available / 2**30:.1f} GiB of free memory",
            f"about {needed / 2**30:.1f} GiB",
            f"{other} smaller size or a narrower network.",
        )


def available_bytes(device: torch.device) -> int | None:
    """Free memory; None where nobody tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def check_same_settings(what: str, then: Mapping[str, Any], now: Mapping[str, Any], fix: str) -> None:
    """Refuse to continue a run with other settings, and name them.

    Raises InputError listing each difference as "group.name then -> now".
    """
    before, after = _flatten(then), _flatten(now)
    different = [
        f"{name} {before.get(name)} -> {after.get(name)}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
    if different:
        raise bad_input(what, "the settings it was begun with", "; ".join(different), fix)


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def fingerprints(signals: Sequence[Signal]) -> list[str]:
    """Hashes of all signals, in order."""
    return [signal.fingerprint() for signal in signals]

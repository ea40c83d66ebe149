"""What fits and pre-training share: environment of a run, memory needed, differences between two runs."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from strainer_fast._checks import bad_input
from strainer_fast.models import Architecture
from strainer_fast.signals import Signal


def environment(implementation: str, device: torch.device) -> dict[str, Any]:
    """What two runs must share to give the same bits."""
    return {
        "implementation": implementation,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def step_bytes(points: int, num_signals: int, architecture: Architecture) -> int:
    """Memory of one autograd step, about: sine inputs and outputs of every layer, and a few temporaries."""
    per_point = 4 * architecture.hidden_features * (2 * (architecture.num_layers - 1) + 4)
    return points * num_signals * per_point


def check_memory(
    implementation: str, signal: Signal, num_signals: int, architecture: Architecture, device: torch.device
) -> None:
    """Refuse a signal whose step cannot fit, before anything starts: the system would kill the process."""
    if implementation == "tiled":
        return  # its memory does not grow with the signal
    needed, available = step_bytes(signal.samples().shape[0], num_signals, architecture), _available_bytes(device)
    if available is not None and needed > available:
        raise bad_input(
            f"signal {signal.name!r} of {'x'.join(map(str, signal.shape))} points",
            f"a step that fits into {available / 2**30:.1f} GiB of free memory",
            f"about {needed / 2**30:.1f} GiB",
            "Use implementation='tiled', a smaller size or a narrower network.",
        )


def _available_bytes(device: torch.device) -> int | None:
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

"""Which implementation runs, and why: one place chooses, and says so."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from dataclasses import dataclass
from functools import cache

import torch

from strainer_fast._checks import bad_input, check_choice
from strainer_fast.kernels import cpu

IMPLEMENTATIONS = ("triton", "native", "tiled", "torch")
"""What this version can run: kernels for a GPU, then for a CPU, fastest first."""

PRECISIONS = ("fp32", "tf32x3", "tf32", "fp16", "bf16")
"""What operands of products are rounded to; sums and the sine's argument are float32 always. tf32x3 makes each product
of three on the matrix unit, right to 2^-21 of its operands."""

STRONG_TF32 = ((8, 0), (9, 0), (10, 0), (10, 3))
"""Compute capabilities with seven and more times the tf32 products that fp32 has: A100, H100, B200. Elsewhere it is at
most twice as many, and three for one lose (`python -m strainer_fast.kernels.roofline --render --chip sm_89`)."""

MINIMUM_TRITON = (3, 2)
MINIMUM_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Choice:
    """An implementation and the reason it was taken."""

    name: str
    reason: str


def choose(
    implementation: str, device: torch.device, dtype: torch.dtype = torch.float32, *, whole_fits: bool = False
) -> Choice:
    """Turn "auto" or a name into the implementation that runs steps, or `whole_fits` of small networks.

    Raises InputError for a name this version does not have, and for one that cannot run here; nothing asked for by name
    is replaced silently.
    """
    check_choice("implementation", implementation, ("auto", *IMPLEMENTATIONS), "'auto' takes the fastest there is.")
    if implementation == "triton":
        why = triton_missing(device, dtype)
        if why is not None:
            raise bad_input("implementation", "'triton' where it can run", why, "Use 'auto'.")
        return Choice("triton", "asked for by name")
    if implementation not in ("auto", "native"):
        return Choice(implementation, "asked for by name")
    if device.type != "cpu":
        if implementation == "native":
            raise bad_input("implementation", "'native' on the CPU", f"device {device}", "Use 'auto'.")
        why = triton_missing(device, dtype)
        if why is None:
            return Choice("triton", "kernels for this GPU, one pass over waves of points")
        _warn_once(f"strainer_fast runs plain PyTorch on {device}: {why}")
        return Choice("torch", f"plain PyTorch with autograd: {why}")
    level = cpu.level()
    if implementation == "native":
        if level is None:
            raise bad_input("implementation", "'native' where it was built", f"an engine that is {cpu.missing()}", _FIX)
        if dtype != torch.float32:
            raise bad_input("implementation", "'native' in float32", str(dtype), "Use 'auto' or 'tiled'.")
        return Choice("native", f"asked for by name; {level} kernels")
    if level is None:
        why = f"the native engine is {cpu.missing()}"
    elif level == "portable" and not whole_fits:
        why = "the native engine has no fast kernels for this CPU, which lacks AVX2"
    elif dtype != torch.float32:
        why = f"the native engine is for float32, not {str(dtype).removeprefix('torch.')}"
    else:
        return Choice("native", f"C++ kernels for {level}, one pass over tiles of points; the fastest on a CPU")
    return Choice("tiled", f"one pass over tiles of points in PyTorch's calls; {why}")


def resolve_precision(
    precision: str, implementation: str, device: torch.device, *, can_skip: bool = True, exact: bool = False
) -> str:
    """A precision as a name of PRECISIONS: "auto" is fp16 where the Triton kernels run on a GPU, else fp32.

    Args:
        precision, implementation, device: what was asked for, what runs, and where.
        can_skip: whether steps whose gradients overflow are skipped, as those on all points are; without, "auto" is
            fp32.
        exact: whether results must be float32's for practical purposes, as those of rendering: "auto" is then tf32x3 on
            a GPU whose matrix unit makes that the faster one (STRONG_TF32), else fp32.

    Raises InputError as `check_precision`.
    """
    if precision == "auto":
        if implementation != "triton" or device.type != "cuda":
            return "fp32"
        if exact:
            strong = torch.version.hip is None and torch.cuda.get_device_capability(device) in STRONG_TF32
            return "tf32x3" if strong else "fp32"
        return "fp16" if can_skip else "fp32"
    check_precision(precision, implementation)
    return precision


def check_precision(precision: str, implementation: str) -> None:
    """Refuse a precision that an implementation does not have: only the Triton kernels round operands.

    Raises InputError.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision != "fp32" and implementation != "triton":
        raise bad_input("precision", f"'fp32' with implementation {implementation!r}", repr(precision), "It is exact.")


def triton_missing(device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the Triton kernels cannot run on a device; None where they can.

    On the CPU they run only where Triton was loaded in interpreter mode, which is for tests.
    """
    if device.type not in ("cuda", "cpu"):
        return f"no Triton kernels for {device.type}"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32, not float64"
    problem = _triton_problem()
    if problem is not None:
        return problem
    if device.type == "cpu":
        from strainer_fast.kernels.chip import is_interpreted

        return None if is_interpreted() else "CPU tensors, and Triton was not loaded in interpreter mode"
    problem = _driver_problem()
    if problem is not None:
        return problem
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < MINIMUM_CAPABILITY:
        have = ".".join(map(str, torch.cuda.get_device_capability(device)))
        return f"the Triton kernels need compute capability {'.'.join(map(str, MINIMUM_CAPABILITY))}, this has {have}"
    return None


@cache
def _triton_problem() -> str | None:
    """What is wrong with the installed Triton, without importing it."""
    version = triton_version()
    if version is None:
        return "Triton is not installed"
    if tuple(int(part) for part in version.split(".")[:2]) < MINIMUM_TRITON:
        return f"Triton {version} is too old: {'.'.join(map(str, MINIMUM_TRITON))} or newer is needed"
    return None


@cache
def triton_version() -> str | None:
    """Of the installed module, whatever its distribution is called; None without one."""
    if importlib.util.find_spec("triton") is None:
        return None
    for name in importlib.metadata.packages_distributions().get("triton", ()):
        return importlib.metadata.version(name)
    import triton

    return str(triton.__version__)


@cache
def _driver_problem() -> str | None:
    """Why Triton cannot launch on this machine's GPU: it compiles a piece of its driver at first use."""
    try:
        import triton

        triton.runtime.driver.active.get_current_device()
    except Exception as error:
        return f"Triton cannot start its driver ({type(error).__name__}: {str(error).splitlines()[-1]})"
    return None


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


# torch.compile cannot trace the look at installed packages; the answer is a constant of the graph.
choose._dynamo_marked_constant = True  # type: ignore[attr-defined]

_FIX = "Install strainer_fast where g++ or clang++ works, or use 'auto'."


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU.

    Raises InputError for a device that PyTorch does not see here.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise bad_input("device", "'auto', 'cpu' or 'cuda'", repr(device), "Name a PyTorch device.") from None
    if chosen.type not in ("cpu", "cuda"):
        raise bad_input("device", "'auto', 'cpu' or 'cuda'", repr(str(chosen)), "Other devices are not supported.")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise bad_input("device", "a device that is here", str(chosen), "This PyTorch sees no GPU: use 'cpu'.")
    return chosen


def explain(implementation: str = "auto", device: str | torch.device = "auto") -> str:
    """One line: what runs for these arguments, and why."""
    where = choose_device(device)
    choice = choose(implementation, where)
    return f"{choice.name} on {where}: {choice.reason}"

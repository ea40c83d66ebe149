"""Records what launchers would launch, on a machine without a GPU: run them on tensors of device "meta" in `capture`.

The launchers are the real ones, so what is compiled from a record (aot.py) is what a GPU would run: the same constants,
the same divisibilities of pointers and sizes, the same warps and stages.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from . import configs
from .chip import Chip, assume, is_interpreted
from .tiles import Row

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
"""Triton's names of what pointers point to."""

ALIGNED = 16
"""Triton compiles one kernel for sizes and addresses that are multiples of this, and another for those that are not."""

Path = tuple[int, ...]


@dataclass(frozen=True)
class Specialisation:
    """What the compiler needs to know of a launch, and nothing that a launch of the same binary may change."""

    module: str
    name: str  # of the jitted function in that module
    signature: Mapping[str, Any]  # argument -> type; nested tuples for tuples
    constants: Mapping[Path, Any]  # position -> value
    attributes: Mapping[Path, list[list[Any]]]
    options: Mapping[str, Any]  # num_warps, num_stages, ...
    chip: Chip

    @property
    def key(self) -> str:
        """Equal for launches of the same binary."""
        return repr((self.module, self.name, self.signature, sorted(self.constants.items()),
                     sorted(self.attributes.items()), sorted(self.options.items()), self.chip))  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """A launch that was not done."""

    function: JITFunction
    arguments: dict[str, Any]  # all of them by name, tensors as given
    options: dict[str, Any]
    grid: tuple[int, ...]
    chip: Chip

    @property
    def name(self) -> str:
        """Of the kernel."""
        return str(self.function.__name__)

    @property
    def role(self) -> str:
        """The kernel, and what tells apart its launches in one step."""
        has = self.constants
        suffix = "-first" if has.get("FEW") else "-from-coordinates" if has.get("FIRST") else ""
        return self.name.removesuffix("_kernel").strip("_") + suffix

    @property
    def constants(self) -> dict[str, Any]:
        """The arguments that are part of the program."""
        return {p.name: self.arguments[p.name] for p in self.function.params if p.is_constexpr}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The arguments that are memory, each tensor once: unused ones repeat another."""
        found: dict[str, Tensor] = {}
        for name, value in self.arguments.items():
            if isinstance(value, Tensor) and not any(value is other for other in found.values()):
                found[name] = value
        return found

    def run(self) -> None:
        """Launch it after all, where it was captured with tensors of a device that can."""
        self.function[self.grid](**self.arguments, **self.options)

    def specialise(self) -> Specialisation:
        """As Triton does when it launches.

        Raises TypeError for an argument that Triton would not take.
        """
        signature: dict[str, Any] = {}
        constants: dict[Path, Any] = {}
        attributes: dict[Path, list[list[Any]]] = {}
        for index, parameter in enumerate(self.function.params):
            value = self.arguments[parameter.name]
            if parameter.is_constexpr:
                signature[parameter.name], constants[(index,)] = "constexpr", value
                continue
            kind = _specialise(value, parameter, (index,), constants, attributes, self)
            known = getattr(parameter, "annotation_type", "")
            signature[parameter.name] = known if known and kind != "constexpr" else kind
        return Specialisation(self.function.__module__, self.name, signature, constants, attributes, self.options,
                              self.chip)  # fmt: skip


def _specialise(
    value: object,
    parameter: Any,
    path: Path,
    constants: dict[Path, Any],
    attributes: dict[Path, list[list[Any]]],
    launch: Launch,
) -> Any:
    """The type of an argument; notes what it is if it becomes a constant, and what it is divisible by."""
    special = not parameter.do_not_specialize
    align = special and not parameter.do_not_specialize_on_alignment
    if isinstance(value, tuple):
        return tuple(_specialise(v, parameter, (*path, i), constants, attributes, launch) for i, v in enumerate(value))
    if value is None or (special and isinstance(value, int) and not isinstance(value, bool) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        attributes[path] = [["tt.divisibility", ALIGNED]] if align and value % ALIGNED == 0 else []
        return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, Tensor):
        if value.dtype not in TYPES:
            raise TypeError(f"{launch.name}: {parameter.name}: expected a dtype that Triton has, got {value.dtype}.")
        # A fresh allocation is aligned; a view starts where its offset says.
        offset = value.storage_offset() * value.element_size()
        attributes[path] = [["tt.divisibility", ALIGNED]] if align and offset % ALIGNED == 0 else []
        if launch.chip.target == "hip" and special and value.untyped_storage().nbytes() < 2**31:
            attributes[path] = [*attributes[path], ["tt.pointer_range", 32]]
        return "*" + TYPES[value.dtype]
    raise TypeError(f"{launch.name}: {parameter.name}: expected a tensor, a number, a tuple or None, got {value!r}.")


@contextmanager
def table(rows: Iterable[Row]) -> Iterator[None]:
    """Within, launchers take their tiles from these rows."""
    before = configs.TABLE
    configs.TABLE = tuple(rows)
    try:
        yield
    finally:
        configs.TABLE = before


@contextmanager
def capture(chip: Chip, device: str = "meta") -> Iterator[list[Launch]]:
    """Within, kernels are recorded in the list that this gives instead of launched, as for `chip`.

    Tensors are created on `device` unless told otherwise; the tuner captures on a GPU to launch later.
    Raises RuntimeError in Triton's interpreter mode, TypeError for a launch with tensors of another device.
    """
    if is_interpreted():
        raise RuntimeError(
            "capture: expected Triton's compiler, got its interpreter. Start Python without TRITON_INTERPRET: Triton "
            "decides when it is first imported."
        )
    launches: list[Launch] = []

    def record(function: JITFunction, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> None:
        names = {p.name for p in function.params}
        bound = function.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
        bound.apply_defaults()
        arguments = dict(bound.arguments)
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.device.type != device:
                raise TypeError(
                    f"{function.__name__}: {name}: expected a tensor of device {device}, got one of {value.device}. "
                    f"Nothing is launched here: create it with device={device!r}."
                )
        sizes = grid(arguments) if callable(grid) else grid
        options = {k: v for k, v in kwargs.items() if k not in names}
        launches.append(Launch(function, arguments, options, tuple(int(s) for s in sizes), chip))

    run = JITFunction.run
    JITFunction.run = record
    try:
        with assume(chip), torch.device(device):
            yield launches
    finally:
        JITFunction.run = run

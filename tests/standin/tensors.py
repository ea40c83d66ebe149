"""Tensors that say cuda:0 and hold their numbers on the CPU; every operation on them passes through `dispatch`.

PyTorch's C++ believes that they are on the CPU, so what it decides by itself is as there: autocast for CUDA does
nothing, and some gradients (through a copy from the device, of strided inputs) arrive as host tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.standin.counts import note, site
from tests.standin.graphs import Graph, recording, wait

DEVICE, HOST = torch.device("cuda", 0), torch.device("cpu")

MIXED = ("copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_")
"""Operations that take operands on both devices."""

WAIT = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "equal", "is_nonzero",
        "_linalg_check_errors", "repeat_interleave")  # fmt: skip
"""Operations whose result, or the size of it, the host has to know."""

_to, _tensor, _as_tensor = Tensor.to, torch.tensor, torch.as_tensor


class DeviceTensor(Tensor):
    """A tensor on the stand-in; `inner` is the CPU's."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, requires_grad: bool = False) -> DeviceTensor:
        # To PyTorch's C++ it is on the CPU, for there is no other device; `device` says what Python is to believe.
        self: DeviceTensor = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=HOST, requires_grad=requires_grad)  # fmt: skip
        self.inner = inner.detach()
        return self

    def __repr__(self, **_: object) -> str:
        return f"DeviceTensor({self.inner})"

    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, other: DeviceTensor) -> None:
        Tensor.data.__set__(self, other)  # type: ignore[attr-defined]
        self.inner = other.inner

    def __deepcopy__(self, memo: Any) -> Tensor:
        with torch.no_grad():
            found = self.detach().clone().requires_grad_(self.requires_grad)
        return torch.nn.Parameter(found, self.requires_grad) if isinstance(self, torch.nn.Parameter) else found

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def is_pinned(self, device: object = None) -> bool:
        return False

    def pin_memory(self, device: object = None) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def numpy(self, **_: object) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def tolist(self) -> Any:
        wait("tolist")
        return self.inner.tolist()

    def new_tensor(self, data: Any, **kwargs: Any) -> Tensor:
        return tensor(data, **{"dtype": self.dtype, "device": DEVICE, **kwargs})

    def cpu(self, memory_format: object = None) -> Tensor:
        return self.to(HOST)

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """By PyTorch's own `to`, which has to be told when the device is left."""
        target, rest = kwargs.pop("device", None), []
        for value in args:
            if isinstance(value, str | torch.device | int) and not isinstance(value, bool):
                target = value
            elif isinstance(value, Tensor):
                target = value.device
                rest.append(value.dtype)
            elif value is not None:
                rest.append(value)
        dtypes = [r for r in rest if isinstance(r, torch.dtype)]
        dtype = kwargs.pop("dtype", None) or (dtypes[0] if dtypes else self.dtype)
        flags = [r for r in rest if isinstance(r, bool)]
        non_blocking = kwargs.pop("non_blocking", flags[0] if flags else False)
        if target is not None and not is_device(target):
            _leaving.append(True)
            try:
                found: Tensor = torch.ops.aten._to_copy(self, dtype=dtype, device=HOST, non_blocking=non_blocking)
            finally:
                _leaving.pop()
            return found
        return _to(self, dtype, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> Tensor:
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


class Mode(TorchDispatchMode):
    """Sees operations that have no tensor on the device yet, such as `torch.zeros(..., device="cuda")`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


MODE = Mode()
_leaving: list[bool] = []
"""Not empty while `DeviceTensor.to` takes a tensor to the host."""
_pinned: dict[int, StorageWeakRef] = {}


def pin(tensor: Tensor) -> Tensor:
    """Note that its memory is pinned."""
    reference = StorageWeakRef(tensor.untyped_storage())
    _pinned[reference.cdata] = reference  # as long as the reference is there, nothing else has its address
    return tensor


def is_pinned(tensor: Tensor, device: object = None) -> bool:
    """Whether a host tensor's memory is pinned."""
    return tensor.untyped_storage()._cdata in _pinned


def is_device(device: Any) -> bool:
    """Whether that is the stand-in; None is not."""
    return device is not None and torch.device(device).type == "cuda"


def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Tensor.to of host tensors: C++ cannot ask for the current device's index, nor what device ours have."""
    if args and isinstance(args[0], DeviceTensor):
        args = (DEVICE, args[0].dtype, *args[1:])
    elif args and isinstance(args[0], str | torch.device) and is_device(args[0]):
        args = (DEVICE, *args[1:])
    elif is_device(kwargs.get("device")):
        kwargs["device"] = DEVICE
    return _to(self, *args, **kwargs)


def tensor(data: Any, *, device: Any = None, **kwargs: Any) -> Tensor:
    """torch.tensor: C++ fills it where no dispatch is seen."""
    device = torch.empty(0).device if device is None else device  # the default one
    made = _tensor(data, device=HOST if is_device(device) else device, **kwargs)
    return to(made, DEVICE) if is_device(device) else made


def as_tensor(data: Any, dtype: Any = None, device: Any = None) -> Tensor:
    """torch.as_tensor, as `tensor`."""
    if isinstance(data, Tensor):
        return data.to(device=device or data.device, dtype=dtype or data.dtype)
    return tensor(data, dtype=dtype, device=device)


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation on the CPU, check it as CUDA does, count it, record it into a graph."""
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    ours = [t for t in tensors if isinstance(t, DeviceTensor)]
    target = kwargs.get("device")
    if not ours and not is_device(target):
        return _on_host(func, args, kwargs)
    name = func._schema.name.removeprefix("aten::")
    if func.namespace == "strainer_fast":
        from torch._library.custom_ops import OPDEFS

        with MODE:
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    _check(func, name, tensors, kwargs)
    reason = _waits(name, args, kwargs, ours)
    if reason is not None:
        wait(reason)

    leaves = _leaves(name, target)
    plain, options = tree_map(_inner, args), tree_map(_inner, dict(kwargs))
    if is_device(target):
        options["device"] = HOST
    view = getattr(func, "is_view", False) or name in ("detach", "_unsafe_view", "lift_fresh", "alias")
    written = [a for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    graph = recording()
    if view:
        return tree_map(_outer, func(*plain, **options))
    if graph is None:
        note("operations", name)
        found = func(*plain, **options)
    elif written:
        graph.add(name, func, *_by_value(graph, plain, options, args))
        found = None
    else:
        found = func(*plain, **options)  # for shapes and strides; what it holds is known after a replay
        for new in tree_flatten(found)[0]:
            graph.note_own(new)
        if "empty" not in name:
            graph.add(name, func, *_by_value(graph, plain, options, args), into=found)
    if written:
        return _written(func, args, kwargs)
    if leaves:
        return pin(found) if options.get("non_blocking") else found
    return tree_map(_outer, found)


def _leaves(name: str, target: Any) -> bool:
    """Whether a result is the host's. PyTorch's C++, for which ours are there already, casts without meaning that."""
    return target is not None and not is_device(target) and (name != "_to_copy" or bool(_leaving))


def _on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if kwargs.get("pin_memory"):
        return pin(func(*args, **{**kwargs, "pin_memory": False}))
    return func(*args, **kwargs)


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, DeviceTensor) else value


def _outer(value: Any) -> Any:
    return DeviceTensor(value) if isinstance(value, Tensor) and not isinstance(value, DeviceTensor) else value


def _by_value(graph: Graph, plain: Any, options: Any, given: Any) -> tuple[Any, Any]:
    """Arguments as a recorded kernel has them: a number of the host is part of the launch, not an address."""

    def copied(value: Any, original: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(original, DeviceTensor) or value.ndim:
            return value
        number = value.clone()
        graph.note_own(number)
        return number

    return tuple(copied(a, b) for a, b in zip(plain, given, strict=True)), options


def _check(func: Any, name: str, tensors: list[Tensor], kwargs: dict[str, Any]) -> None:
    """Raises RuntimeError as PyTorch does for operands on two devices and for a generator of another one."""
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(f"Expected a 'cuda' device type for generator but found 'cpu': {func} at {site()}")
    strangers = [list(t.shape) for t in tensors if not isinstance(t, DeviceTensor) and t.ndim > 0]
    if strangers and len(strangers) < len(tensors) and name not in MIXED:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! {func} at "
            f"{site()}, on the CPU: shapes {strangers}"
        )


def _waits(name: str, args: Any, kwargs: dict[str, Any], ours: list[Tensor]) -> str | None:
    """Why the host waits for this operation; None if it does not."""
    if name in WAIT or (name == "linalg_cholesky_ex" and kwargs.get("check_errors")):
        return name
    if name == "_to_copy":
        target, blocking = kwargs.get("device"), not kwargs.get("non_blocking")
        if ours and _leaves(name, target):
            return "copy to the host" if blocking else None
        return "copy to the device" if not ours and blocking else None
    if name == "copy_":
        into, source = args[:2]
        non_blocking = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
        if isinstance(into, DeviceTensor):
            return None if isinstance(source, DeviceTensor) or non_blocking else "copy to the device"
        return None if non_blocking and is_pinned(into) else "copy to the host"
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        indices = [i for i in args[1] or () if isinstance(i, Tensor)]
        if any(i.dtype == torch.bool for i in indices):
            return "index of booleans"
        if any(not isinstance(i, DeviceTensor) for i in indices):
            return "index from the host"
    return None


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation in place returns: the very tensors that it was given."""
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    found = []
    for result in func._schema.returns:
        if result.alias_info is None:
            raise NotImplementedError(f"{func}: a stand-in for operations that write and return something new")
        for argument in func._schema.arguments:
            alias = argument.alias_info
            if alias is not None and alias.is_write and alias.before_set & result.alias_info.before_set:
                found.append(given[argument.name])
    return found[0] if len(found) == 1 else tuple(found) if found else None

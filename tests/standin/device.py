"""torch.cuda, Triton's driver and its launcher as they are where there is a GPU."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map

from tests.interpreter import interpret
from tests.standin import graphs, tensors
from tests.standin.counts import note, site

NAME = "a stand-in for an H100"
MEMORY = 80 * 2**30
PROPERTIES = SimpleNamespace(name=NAME, major=9, minor=0, multi_processor_count=132, total_memory=MEMORY,
                             shared_memory_per_block_optin=227 * 1024, L2_cache_size=50 * 2**20)  # fmt: skip


def install(*, compiler: bool = False) -> None:
    """Put the stand-in into this process, for good.

    Args:
        compiler: compile kernels for sm_90 instead of running them, which leaves what they write as it is: what fills
            a cache beforehand (benchmarks/first_light/prebuild.py).

    Raises RuntimeError where there is a GPU, and where Triton was loaded the other way.
    """
    if torch.cuda.is_available is _is_available:
        return
    if torch.cuda.is_available():
        raise RuntimeError("the stand-in for a GPU: expected a machine without one, got one. Use it instead.")
    if "triton" in sys.modules and (os.environ.get("TRITON_INTERPRET") == "1") == compiler:
        raise RuntimeError("the stand-in for a GPU: expected to come before Triton, which is loaded the other way.")
    if compiler:
        os.environ.pop("TRITON_INTERPRET", None)
    else:
        interpret()
    _replace_cuda()
    _replace_tensors()
    _replace_driver()
    if compiler:
        _compile_only()
    else:
        _interpret_launches()
    tensors.MODE.__enter__()


def _is_available() -> bool:
    return True


def _replace_cuda() -> None:
    replaced: dict[str, Any] = {
        "is_available": _is_available,
        "_lazy_init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "device": lambda device: nullcontext(),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: PROPERTIES,
        "mem_get_info": lambda device=None: (MEMORY - 2**30, MEMORY),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": lambda device=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: graphs.wait("torch.cuda.synchronize"),
        "Stream": graphs.Stream,
        "Event": graphs.Event,
        "stream": graphs.using,
        "current_stream": graphs.current_stream,
        "default_stream": lambda device=None: graphs.DEFAULT,
        "set_stream": graphs.set_stream,
        "CUDAGraph": graphs.Graph,
        "graph": graphs.graph,
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: graphs.recording() is not None,
    }
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)


def _replace_tensors() -> None:
    torch.tensor, torch.as_tensor = tensors.tensor, tensors.as_tensor
    Tensor.to = tensors.to  # type: ignore[method-assign, assignment]
    Tensor.cuda = lambda self, *a, **k: tensors.to(self, tensors.DEVICE)  # type: ignore[method-assign, assignment]
    Tensor.pin_memory = lambda self, device=None: tensors.pin(self.clone())  # type: ignore[method-assign, assignment]
    Tensor.is_pinned = tensors.is_pinned  # type: ignore[method-assign, assignment]
    # A parameter cannot turn into one of another class in place.
    torch.__future__.set_overwrite_module_params_on_conversion(True)


def refuse_host(kernel: str, arguments: object) -> None:
    """Raises ValueError, as Triton does, for a tensor among the arguments that is not on the device."""
    for value in tree_flatten(arguments)[0]:
        if isinstance(value, Tensor) and not isinstance(value, tensors.DeviceTensor):
            raise ValueError(
                f"Pointer argument cannot be accessed from Triton (cpu tensor?): {kernel} at {site()}, a tensor of "
                f"shape {list(value.shape)}"
            )


def _replace_driver() -> None:
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    target = GPUTarget("cuda", 10 * PROPERTIES.major + PROPERTIES.minor, 32)
    driver.set_active(SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device=None: 0, get_current_target=lambda: target,
        get_active_torch_device=lambda: tensors.HOST))  # fmt: skip


def _compile_only() -> None:
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def launch(self: Any, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        refuse_host(self.__name__, (args, kwargs))
        note("launches", self.__name__)
        return run(self, *tree_map(tensors._inner, args), grid=grid, warmup=True,
                   **tree_map(tensors._inner, kwargs))  # fmt: skip

    JITFunction.run = launch


def _interpret_launches() -> None:
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        refuse_host(name, (args, kwargs))
        plain, options = tree_map(tensors._inner, args), tree_map(tensors._inner, kwargs)
        graph = graphs.recording()
        if graph is None:
            note("launches", name)
            run(self, *plain, **options)
        else:
            graph.add(name, lambda *a, **k: run(self, *a, **k), plain, options)

    interpreter.GridExecutor.__call__ = launch

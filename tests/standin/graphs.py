"""CUDA graphs: while one is recorded nothing that writes is done, and a replay does it on the same memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

from tests.standin.counts import note

CAPTURE_ERROR = "CUDA error: operation not permitted when stream is capturing"


class Stream:
    """Work is done as it is asked for, so a stream is its identity, and whether a graph records it."""

    def __init__(self, device: object = None, priority: int = 0, **_: object) -> None:
        self.device, self.cuda_stream = torch.device("cuda", 0), id(self)

    def wait_stream(self, other: Stream) -> None:
        """What follows here is part of what `other` is recorded into."""
        if _recording is not None and other in _recording.streams:
            _recording.streams.append(self)

    def wait_event(self, event: Event) -> None:
        """See wait_stream."""
        if event.stream is not None:
            self.wait_stream(event.stream)

    def record_event(self, event: Event | None = None) -> Event:
        """A new event, or the one given, recorded here."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """The host waits."""
        wait("stream")

    def query(self) -> bool:
        """All work is done."""
        return True


class Event:
    """Done as soon as it is recorded; its times are the host's and mean nothing."""

    clock = 0.0

    def __init__(self, enable_timing: bool = False, blocking: bool = False, **_: object) -> None:
        self.enable_timing, self.stream, self.at = enable_timing, None, 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Note the stream, and a time that only grows."""
        Event.clock += 1.0
        self.stream, self.at = stream or current_stream(), Event.clock

    def wait(self, stream: Stream | None = None) -> None:
        """A stream waits, not the host."""
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        """The host waits."""
        wait("event")

    def query(self) -> bool:
        """All work is done."""
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds that mean nothing: one for each event recorded between.

        Raises RuntimeError, as CUDA does, for events without times or not recorded.
        """
        if not (self.enable_timing and end.enable_timing and self.stream and end.stream):
            raise RuntimeError("Both events must be created with argument 'enable_timing=True' and recorded.")
        return end.at - self.at


DEFAULT = Stream()
_current: list[Stream] = [DEFAULT]
_recording: Graph | None = None


def current_stream(device: object = None) -> Stream:
    """The one that work goes to."""
    return _current[0]


def set_stream(stream: Stream) -> None:
    """Work goes there from now on."""
    _current[0] = stream


class using:
    """Within, work goes to a stream."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> Self:
        self.before = current_stream()
        set_stream(self.stream or self.before)
        return self

    def __exit__(self, *_: object) -> None:
        set_stream(self.before)


def wait(what: str) -> None:
    """The host waits for the device.

    Raises RuntimeError while a graph is recorded, which it spoils.
    """
    if _recording is not None:
        _recording.spoilt = True
        raise RuntimeError(f"{CAPTURE_ERROR}: {what} waits for the device")
    note("synchronisations", what)


def recording() -> Graph | None:
    """The graph that what is asked now becomes part of."""
    return _recording if _recording is not None and current_stream() in _recording.streams else None


class Memory:
    """A tensor as a graph knows it: an address. What was there before the recording is not kept alive by it."""

    def __init__(self, tensor: Tensor, owned: bool) -> None:
        self.kept = tensor if owned else None
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset()
        self.shape, self.strides = tensor.shape, tensor.stride()

    def tensor(self) -> Tensor:
        """The memory as it is now.

        Raises RuntimeError if it was freed: a GPU would write over what has taken its place.
        """
        if self.kept is not None:
            return self.kept
        storage = torch.UntypedStorage._new_with_weak_ptr(self.storage.cdata)
        if storage is None:
            raise RuntimeError(f"a graph is replayed on memory that was freed, of a tensor of shape {list(self.shape)}")
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.shape, self.strides)


class Graph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.work: list[tuple[str, Callable[[], None]]] = []
        self.outputs: list[Tensor] = []  # of operations, which hold nothing until the first replay
        self.own: set[int] = set()  # memory that is the graph's
        self.streams: list[Stream] = []
        self.spoilt = self.ready = False

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        """Record what is asked on the current stream from now on.

        Raises RuntimeError on the default stream and where a recording is under way.
        """
        global _recording
        if current_stream() is DEFAULT:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        if _recording is not None:
            raise RuntimeError(f"{CAPTURE_ERROR}: a recording is under way")
        note("captures", "graph")
        self.reset()
        self.streams = [current_stream()]
        _recording = self

    def capture_end(self) -> None:
        """The graph can be replayed.

        Raises RuntimeError if something that cannot be recorded was asked for meanwhile.
        """
        global _recording
        _recording = None
        if self.spoilt:
            self.reset()
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        for output in self.outputs:  # an operation has not run yet
            if output.is_floating_point():
                output.fill_(torch.nan)
        self.ready = True

    def replay(self) -> None:
        """Do all that was recorded.

        Raises RuntimeError without a recording, and while one is under way.
        """
        if not self.ready or _recording is not None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture, or within one.")
        note("replays", "graph")
        for what, run in self.work:
            note("replayed", what, sited=False)
            run()

    def reset(self) -> None:
        """Forget what was recorded."""
        self.work, self.outputs, self.own, self.streams = [], [], set(), []
        self.spoilt = self.ready = False

    def pool(self) -> tuple[int, int]:
        """A handle that means nothing."""
        return (0, id(self))

    def note_own(self, tensor: Tensor) -> None:
        """Memory that was allocated while recording lives as long as the graph."""
        self.own.add(tensor.untyped_storage()._cdata)

    def add(self, what: str, run: Callable[..., Any], args: Any, kwargs: Any, into: Any = None) -> None:
        """Record `run` of plain tensors; results go to the memory of `into`, which has their structure."""

        def remember(value: Any) -> Any:
            return Memory(value, value.untyped_storage()._cdata in self.own) if isinstance(value, Tensor) else value

        def recall(value: Any) -> Any:
            return value.tensor() if isinstance(value, Memory) else value

        args, kwargs = tree_map(remember, args), tree_map(remember, dict(kwargs))
        places = [into] if isinstance(into, Tensor) else list(into or ())
        self.outputs += places

        def again() -> None:
            found = run(*tree_map(recall, args), **tree_map(recall, kwargs))
            for place, new in zip(places, [found] if isinstance(found, Tensor) else found or (), strict=bool(places)):
                place.copy_(new)

        self.work.append((what, again))


class graph:
    """torch.cuda.graph: waits for the device, then records on a stream of its own."""

    def __init__(
        self, graph: Graph, pool: object = None, stream: Stream | None = None, capture_error_mode: str = "global"
    ) -> None:
        self.graph, self.stream = graph, using(stream or Stream())

    def __enter__(self) -> None:
        wait("torch.cuda.graph")
        self.stream.__enter__()
        self.graph.capture_begin()

    def __exit__(self, *_: object) -> None:
        try:
            self.graph.capture_end()
        finally:
            self.stream.__exit__()

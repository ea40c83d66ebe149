"""Fit a whole data set: signals stream in, networks stream out, and a killed run goes on where it was."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from strainer_fast._checks import bad_input, check_choice, check_count
from strainer_fast.datasets.cluster import fit_on_ray
from strainer_fast.datasets.folder import Row, parameter_shapes
from strainer_fast.datasets.reader import FittedDataset
from strainer_fast.datasets.writer import Writer, open_writer
from strainer_fast.fitting import engine
from strainer_fast.fitting.fitter import Entry, Fitted, Fitter
from strainer_fast.fitting.interrupt import Interrupted, deferred_interrupt
from strainer_fast.fitting.presets import recipe as get_recipe
from strainer_fast.fitting.recipe import Recipe
from strainer_fast.fitting.record import INTERRUPTED, Progress
from strainer_fast.models import Architecture, Encoder
from strainer_fast.signals import Signal, Skipped
from strainer_fast.signals.load import Source
from strainer_fast.signals.stream import Stream, stream

WAITING_BYTES = 2**26
"""Signals of other sizes that wait while one size is fitted take at most this."""

CALLBACK_SECONDS = 0.2


@dataclass(frozen=True)
class DatasetProgress:
    """What a run knows now and then.

    Args:
        finished: signals of this part that are fitted, those of earlier runs included as far as they were read again.
        number: of signals of this part, skipped ones included; None where only the end of the source will tell.
        skipped: files of this run that could not be read.
        fitted: signals fitted by this run.
        seconds: since the run began.
        psnr: median of those that stopped last, dB.
    """

    finished: int
    number: int | None
    skipped: int
    fitted: int
    seconds: float
    psnr: float


@engine.neutral()
def fit_dataset(
    signals: Source | Iterable[Source] | Stream,
    out: str | Path,
    init: Encoder | str | Path = "siren",
    recipe: str | Recipe = "fast",
    *,
    target_psnr: float | None = None,
    architecture: Architecture | None = None,
    num_parallel: int | str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] = (0, 1),
    shard_rows: int | None = None,
    engine: str = "local",
    workers: int | None = None,
    implementation: str = "auto",
    device: str = "auto",
    on_progress: Callable[[DatasetProgress], None] = lambda progress: None,
    **reading: Any,
) -> FittedDataset:
    """Fit one network to each signal of a data set, and keep them in a folder.

    Networks advance together; each stops on its own target, budget or plateau, and the next signal takes its place.
    Whatever is finished is on the disk at once: after a kill, the same call with resume=True goes on without fitting
    anything twice. Memory does not grow with the number of signals.

    Args:
        signals: anything `strainer_fast.signals.stream` reads, or what it returned.
        out: the folder; see `FittedDataset`.
        init: "siren": random networks, each signal its own; "shared": one random network for all, which learning on
            weights needs; an Encoder, or the path of one: STRAINER, or meta-learned with recipe.start="mean".
        recipe, target_psnr, architecture, implementation, device: as of `fit`. With recipe.freeze at all layers of an
            encoder and steps=0 only the heads are solved for.
        num_parallel: signals at a time; "auto" by the sizes of caches and memory.
        resume: go on with what is in the folder.
        overwrite: replace what is in the folder.
        shard: (i, n): take every n-th signal from the i-th on, beside other processes that take the rest.
        shard_rows: networks of a full file; by default 4096, or as many as fit into 64 MiB.
        engine: "local": this process; "ray": the workers of a Ray cluster (RAY_ADDRESS, or one on this machine for the
            time of the call), each a part of the signals; source and folder must be theirs too, under the same paths.
            A worker that dies loses nothing and is replaced.
        workers: of engine "ray", which share the cluster's cores; by default one for each core, or GPU.
        on_progress: called several times a second at most.
        reading: as of `strainer_fast.signals.stream`: size, channels, value_range, key, ...

    Returns:
        The data set, all parts of it that are there.

    Raises:
        InputError: unusable settings or signals; a folder that holds other settings, another source, or signals that
            have changed since, with the difference named; a folder that another run works on.
        OSError: a full disk; what was finished is kept.
        Interrupted: on Ctrl-C; its `result` is the data set so far.
    """
    source = signals if isinstance(signals, Stream) else stream(signals, **reading)
    if isinstance(signals, Stream) and reading:
        raise bad_input("options", "none about reading beside a Stream", ", ".join(reading), "Pass them to stream().")
    recipe = get_recipe(recipe) if target_psnr is None else get_recipe(recipe, target_psnr=target_psnr)
    at_once = None if num_parallel == "auto" else check_count("num_parallel", num_parallel)
    part = (check_count("shard", shard[0], 0, shard[1] - 1), check_count("shard", shard[1]))
    if check_choice("engine", engine, ("local", "ray")) == "local" and workers is not None:
        raise bad_input("workers", "none of engine local", workers, 'For processes use engine="ray", or shard=(i, n).')
    fitter = Fitter(init, recipe, architecture, implementation, device)
    folder = Path(out)
    queue = _Queue(source, part)
    first = queue.first()  # what cannot be read or fitted is refused before the folder is touched
    fitter.check(first)
    if engine == "ray":
        if part != (0, 1):
            raise bad_input("shard", "none beside engine ray", shard, "Its workers divide the signals themselves.")
        return fit_on_ray(
            fit_dataset,
            source,
            folder,
            workers,
            resume=resume,
            overwrite=overwrite,
            on_progress=partial(_sum_up, source.number, on_progress),
            init=init,
            recipe=recipe,
            architecture=architecture,
            num_parallel=num_parallel,
            shard_rows=shard_rows,
            implementation=implementation,
            device=device,
        )
    settings = {
        **fitter.settings,
        "source": source.description,
        "environment": fitter.environment([first.values.shape]),
    }
    parameters = parameter_shapes(fitter.network, len(first.shape), first.channels).values()
    own = 0 if source.number is None else len(range(part[0], source.number, part[1]))
    with (
        open_writer(
            folder,
            settings,
            fitter.network,
            part,
            resume=resume,
            overwrite=overwrite,
            shard_rows=shard_rows,
            needed_bytes=4 * own * sum(map(math.prod, parameters)),
        ) as writer,
        deferred_interrupt() as interrupted,
    ):
        run = _Run(writer, queue, own if source.number is not None else None, on_progress)
        queue.begin(writer)
        while (shape := queue.next_shape()) is not None and not interrupted():
            fitter.check(queue.waiting[shape][0].signal)
            fitter.run(
                shape,
                partial(queue.take, shape),
                size=at_once,
                stop=interrupted,
                on_check=run.look,
                on_fitted=run.keep,
            )
        run.report(last=True)
    dataset = FittedDataset(folder)
    if interrupted():
        message = f"interrupted: {run.fitted} signals fitted, {len(dataset)} in {folder}. Resume to go on."
        raise Interrupted(message, dataset)
    return dataset


def _sum_up(
    number: int | None, on_progress: Callable[[DatasetProgress], None], parts: list[DatasetProgress], seconds: float
) -> None:
    """Tell the caller what several processes know."""
    if parts:
        totals = [sum(getattr(p, field) for p in parts) for field in ("finished", "skipped", "fitted")]
        psnr = sorted(p.psnr for p in parts if math.isfinite(p.psnr))
        middle = psnr[len(psnr) // 2] if psnr else float("nan")
        on_progress(DatasetProgress(totals[0], number, totals[1], totals[2], seconds, middle))


class _Queue:
    """Signals on their way from the stream to a fit, by shape [*grid, C]."""

    def __init__(self, source: Stream, part: tuple[int, int]) -> None:
        self._part, self._parts = index, parts = part
        self._items = source.read(lambda i: i % parts == index)
        self._kept: list[tuple[int, str, Signal | Skipped]] = []
        self._writer: Writer | None = None
        self.sources: dict[int, str] = {}
        self.waiting: dict[tuple[int, ...], deque[Entry]] = {}
        self.skipped = self.passed = 0  # not read, and fitted already
        self._bytes = 0

    def first(self) -> Signal:
        """The first signal that can be read; it stays in the queue."""
        for item in self._items:
            self._kept.append(item)
            if isinstance(item[2], Signal):
                return item[2]
        if not self._kept and self._parts > 1:
            fix = "Take fewer parts than there are signals."
            raise bad_input("shard", "a part with signals", f"none for part {self._part} of {self._parts}", fix)
        reasons = "; ".join(f"{i[2].source}: {i[2].reason}" for i in self._kept[:3] if isinstance(i[2], Skipped))
        raise bad_input("signals", "at least one that can be read", reasons or "none", "Check the source.")

    def begin(self, writer: Writer) -> None:
        """From now on leave out what is fitted already."""
        self._writer = writer

    def _pull(self) -> tuple[int, ...] | None:
        """The shape of the next signal that is not fitted yet, which waits from now on; None at the end."""
        assert self._writer is not None
        while True:
            item = self._kept.pop(0) if self._kept else next(self._items, None)
            if item is None:
                return None
            index, source, signal = item
            if isinstance(signal, Skipped):
                self.skipped += 1
                self._writer.skip(index, signal)
                continue
            fingerprint = signal.fingerprint()
            before = self._writer.finished.fingerprint(index)
            if before is None:
                shape = tuple(signal.values.shape)
                self.sources[index] = source
                self.waiting.setdefault(shape, deque()).append(Entry(index, signal, fingerprint))
                self._bytes += 4 * signal.values.numel()
                return shape
            self.passed += 1
            if before != fingerprint:
                raise bad_input(
                    f"signal {index} ({source})",
                    "the values that it was fitted to",
                    "others",
                    "The source has changed: use another folder, or overwrite this one.",
                )

    def next_shape(self) -> tuple[int, ...] | None:
        """The shape that most signals wait with; None when there are no more."""
        if not any(self.waiting.values()):
            return self._pull()
        return max(self.waiting, key=lambda shape: len(self.waiting[shape]))

    def take(self, shape: tuple[int, ...], number: int) -> list[Entry]:
        """Up to `number` signals of a shape; fewer when too many of others wait, none when it is their turn."""
        own = self.waiting.setdefault(shape, deque())
        size = 4 * math.prod(shape)
        while len(own) < number and self._bytes - size * len(own) < WAITING_BYTES:
            if self._pull() is None:
                break
        taken = [own.popleft() for _ in range(min(number, len(own)))]
        self._bytes -= size * len(taken)
        if not own:
            del self.waiting[shape]
        return taken


class _Run:
    """What is finished goes to the writer, what is known to the caller."""

    def __init__(
        self,
        writer: Writer,
        queue: _Queue,
        number: int | None,
        on_progress: Callable[[DatasetProgress], None],
    ) -> None:
        self.writer, self.queue, self.number, self.on_progress = writer, queue, number, on_progress
        self.begin = self.reported = time.monotonic()
        self.fitted = 0
        self.last: deque[float] = deque(maxlen=101)

    def keep(self, fitted: Fitted) -> None:
        """Networks that have stopped; interrupted ones are fitted again by the run that goes on."""
        rows, places = [], []
        for place, (index, signal) in enumerate(zip(fitted.indices, fitted.signals, strict=True)):
            source = self.queue.sources.pop(index)
            if signal.stop_reason != INTERRUPTED:
                rows.append(Row(index, source, signal))
                places.append(place)
        if not rows:
            return
        self.writer.append(rows, {name: w[places] for name, w in fitted.weights.items()})
        self.fitted += len(rows)
        self.last.extend(row.signal.psnr for row in rows)
        self.report()

    def look(self, progress: Progress) -> None:
        """Show that it goes on."""
        self.report()

    def report(self, last: bool = False) -> None:
        """Tell the caller, not too often."""
        now = time.monotonic()
        if not last and now - self.reported < CALLBACK_SECONDS:
            return
        self.reported = now
        median = sorted(self.last)[len(self.last) // 2] if self.last else float("nan")
        known = (self.queue.passed + self.fitted, self.number, self.queue.skipped, self.fitted)
        self.on_progress(DatasetProgress(*known, now - self.begin, median))

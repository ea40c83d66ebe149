"""Fit a data set with the processes of a Ray cluster.

Tasks of Ray Core, one for each part of the signals, as `--shard` divides them. Ray Data would carry signals and
networks through its object store and knows of a row only whether its task has ended; a part reads its own signals,
keeps every network on the disk when its fit is over, and goes on from there when its worker was killed.
"""

from __future__ import annotations

import contextlib
import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from strainer_fast._checks import bad_input, check_count
from strainer_fast.datasets.reader import FittedDataset
from strainer_fast.datasets.writer import begin
from strainer_fast.fitting.interrupt import Interrupted, deferred_interrupt
from strainer_fast.ops import choose_device
from strainer_fast.signals.stream import Stream

RETRIES = 20
"""Of a part whose worker was killed."""

LOOK_SECONDS = 0.5


def fit_on_ray(
    fit: Callable[..., FittedDataset],
    source: Stream,
    folder: Path,
    workers: int | None,
    *,
    resume: bool,
    overwrite: bool,
    on_progress: Callable[[list[Any], float], None],
    **settings: Any,
) -> FittedDataset:
    """Fit the parts of a data set side by side; returns when the folder is complete.

    Args:
        fit: `fit_dataset`, which each worker calls on its part with `settings`.
        source, folder: which all machines of the cluster can read, and write, under the same path.
        workers: of the cluster, which share its cores; by default one for each core, or GPU where fits run on GPUs.
        resume, overwrite: as of `fit_dataset`.
        on_progress: called with what is known of each part, and the seconds so far.

    Raises: as `fit_dataset`; InputError without ray, or for signals that can be read only once.
    """
    try:
        import ray  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        raise bad_input("engine", "ray to be installed", "none", "pip install 'strainer-fast[ray]'") from None
    try:
        pickle.dumps(source)
    except (TypeError, AttributeError, pickle.PicklingError):
        fix = "Workers read them for themselves: pass a path, an array or a list."
        raise bad_input(
            "signals of engine ray", "what can be read again", "what cannot be sent to workers", fix
        ) from None
    on_gpu = choose_device(settings["device"]).type == "cuda"
    with _cluster(ray) as total, deferred_interrupt() as interrupted:
        cores, gpus = int(total.get("CPU", 1)), int(total.get("GPU", 0))
        number = workers or max(1, gpus if on_gpu else cores)
        number = min(check_count("workers", number), source.number or number)
        threads = max(1, cores // number)
        begin(folder, resume, overwrite)
        board: Any = ray.remote(num_cpus=0)(_Board).remote(number)
        part = ray.remote(num_cpus=threads, num_gpus=int(on_gpu), max_retries=RETRIES)(_fit_part)
        shared = ray.put((fit, source, folder.resolve(), settings))
        running = [part.remote(shared, (i, number), threads, board) for i in range(number)]
        began = time.monotonic()
        try:
            while running and not interrupted():
                done, running = ray.wait(running, timeout=LOOK_SECONDS)
                on_progress(ray.get(board.read.remote()), time.monotonic() - began)
                ray.get(done)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        finally:
            for each in running:
                ray.cancel(each)
            if running:  # until they have kept what they finished
                ray.wait(running, num_returns=len(running))
    dataset = FittedDataset(folder)
    if interrupted():
        raise Interrupted(f"interrupted: {len(dataset)} networks in {folder}. Resume to go on.", dataset)
    return dataset


class _Board:
    """What the workers have said last."""

    def __init__(self, number: int) -> None:
        self.said: list[Any] = [None] * number

    def post(self, part: int, progress: Any) -> None:
        self.said[part] = progress

    def read(self) -> list[Any]:
        return [p for p in self.said if p is not None]


def _fit_part(shared: Any, part: tuple[int, int], threads: int, board: Any) -> None:
    """One part, in a worker; it goes on where another one was killed."""
    fit, source, folder, settings = shared
    torch.set_num_threads(threads)

    def post(progress: Any) -> None:
        board.post.remote(part[0], progress)

    fit(source, folder, shard=part, resume=True, on_progress=post, **settings)


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[dict[str, float]]:
    """The resources of the cluster that is there (RAY_ADDRESS), or of one on this machine for as long as it takes."""
    own = not ray.is_initialized()
    if own:
        ray.init(log_to_driver=False, logging_level="warning")
    try:
        yield ray.cluster_resources()
    finally:
        if own:
            ray.shutdown()

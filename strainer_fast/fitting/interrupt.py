"""Ctrl-C that loses nothing: the loop ends after the step it is in."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a fit or pre-training. `result` is what was finished: a FitResult, or None for pre-training."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


@contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only makes the yielded function return True; a second one acts as usual.

    Outside the main thread, or where the program handles SIGINT itself, nothing is changed.
    """
    seen = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal seen
        if seen:
            signal.default_int_handler(number, frame)
        seen = True

    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: seen
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

"""Defers KeyboardInterrupt (SIGINT) during a short critical section."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["deferred"]


@contextlib.contextmanager
def deferred() -> Iterator[list[int]]:
    """Collect interrupts in the list instead of raising them. Only the main thread receives any."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)

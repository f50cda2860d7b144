"""Interrupts (SIGINT, KeyboardInterrupt) that wait until the end of a short critical section. Local."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator

__all__ = ["collected", "delayed", "ignored"]


@contextlib.contextmanager
def collected() -> Iterator[list[int]]:
    """Collect interrupts in the list instead of raising them. Only the main thread receives any."""
    came: list[int] = []
    with _handled_by(lambda number, frame: came.append(number)):
        yield came


@contextlib.contextmanager
def delayed() -> Iterator[None]:
    """Raise what an interrupt raises at the end of the context, so that code which cannot be interrupted completes."""
    came: list[int] = []
    try:
        with collected() as came:
            yield
    finally:
        if came:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def ignored() -> Iterator[None]:
    """Ignore interrupts within the context."""
    with _handled_by(signal.SIG_IGN):
        yield


@contextlib.contextmanager
def _handled_by(handler: signal._HANDLER) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.default_int_handler)

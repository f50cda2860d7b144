"""Communication timer: seconds this process waits for other ranks, moves tensors between ranks, waits for data."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["CommTimer", "comm_timer"]

T = TypeVar("T")
_END: Any = object()


class CommTimer(threading.local):
    """Seconds since the process started, each counted once: a wait inside a communication counts as waiting only.

    Each thread has its own: what one does in the background costs the others nothing until they wait for it.

    Attributes:
        waiting: Waiting for other ranks.
        communication: Moving and adding tensors of other ranks.
        data: Waiting for the next batch.
    """

    def __init__(self) -> None:
        self.waiting = self.communication = self.data = 0.0

    @property
    def total(self) -> float:
        """Their sum."""
        return self.waiting + self.communication + self.data

    @contextlib.contextmanager
    def communicating(self) -> Iterator[None]:
        """Count the context as communication, but for the seconds that it counts itself."""
        began_s, before = time.perf_counter(), self.total
        try:
            yield
        finally:
            self.communication += time.perf_counter() - began_s - (self.total - before)

    def reading(self, batches: Iterable[T]) -> Iterator[T]:
        """Yield `batches`, and count the seconds until each as waiting for data, but for those counted meanwhile."""
        iterator = iter(batches)
        while True:
            began_s, before = time.perf_counter(), self.total
            batch = next(iterator, _END)
            self.data += time.perf_counter() - began_s - (self.total - before)
            if batch is _END:
                return
            yield batch


comm_timer = CommTimer()
"""This thread's timer. On a GPU only `data` is exact: the host does not wait for the device's communication."""

"""Communication timer: seconds this process waits for other ranks, moves tensors between ranks, waits for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["CommTimer", "comm_timer"]


class CommTimer:
    """Seconds since the process started, each counted once: a wait inside a communication counts as waiting only.

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

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Count the context as waiting for data, but for the seconds that it counts itself."""
        began_s, before = time.perf_counter(), self.total
        try:
            yield
        finally:
            self.data += time.perf_counter() - began_s - (self.total - before)


comm_timer = CommTimer()
"""This process's timer. On a GPU only `data` is exact: the host does not wait for the device's communication."""

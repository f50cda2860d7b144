"""Where the time of this process goes: waiting for ranks, moving tensors between them, waiting for data."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

__all__ = ["CommTimer", "comm_timer"]


class CommTimer:
    """Seconds since the process began, each counted once: what waits inside a communication is waiting.

    Attributes:
        idle: Waiting for other ranks.
        communication: Moving and adding tensors of other ranks.
        data: Waiting for the next batch.
    """

    def __init__(self) -> None:
        self.idle = self.communication = self.data = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.idle + self.communication + self.data

    @contextlib.contextmanager
    def communicating(self) -> Iterator[None]:
        """While tensors are moved."""
        began_s, before = time.perf_counter(), self.total
        try:
            yield
        finally:
            self.communication += time.perf_counter() - began_s - (self.total - before)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """While a batch is waited for."""
        began_s, before = time.perf_counter(), self.total
        try:
            yield
        finally:
            self.data += time.perf_counter() - began_s - (self.total - before)


comm_timer = CommTimer()
"""This process's. On a GPU only `data` is told right: nobody waits there for what the device does."""

"""An excerpt: the first batches of a pass over data, and how long each took, for a rehearsal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TypeVar

import torch

__all__ = ["Excerpt"]

T = TypeVar("T")


class Excerpt:
    """Cuts passes over data short. Local.

    Args:
        batches: How many there are at most.
        device: Of the computation, whose end is waited for after each.

    Attributes:
        reading_s: Seconds until each batch was there.
        computing_s: Seconds between a batch and the request for the next one.
    """

    def __init__(self, batches: int, device: torch.device) -> None:
        self.batches = batches
        self._device = device
        self.reading_s: list[float] = []
        self.computing_s: list[float] = []

    def of(self, batches: Iterator[T]) -> Iterator[T]:
        """The first of them."""
        for _ in range(self.batches):
            start_s = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            read_s = time.perf_counter()
            self.reading_s.append(read_s - start_s)
            try:
                yield batch
            finally:
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)
                self.computing_s.append(time.perf_counter() - read_s)

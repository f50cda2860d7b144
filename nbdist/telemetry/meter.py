"""The meter: how fast, and whether it is time to say so."""

from __future__ import annotations

import time

__all__ = ["Meter"]


class Meter:
    """Decides when progress is due and measures speed in between.

    Args:
        samples: Counted before.
        interval_s: Least time between two reports in seconds.
    """

    def __init__(self, samples: int = 0, interval_s: float = 0.2) -> None:
        self._interval_s = interval_s
        self._last_s = time.perf_counter()
        self._last_samples = samples
        self._next_s = 0.0

    def due(self) -> bool:
        """Whether `interval_s` has passed since the last `rate`. Cheap enough for every step."""
        return time.perf_counter() >= self._next_s

    def rate(self, samples: int) -> float:
        """Samples a second since the last call, given the `samples` counted since the start."""
        now_s = time.perf_counter()
        speed = (samples - self._last_samples) / max(now_s - self._last_s, 1e-9)
        self._last_s, self._last_samples, self._next_s = now_s, samples, now_s + self._interval_s
        return speed

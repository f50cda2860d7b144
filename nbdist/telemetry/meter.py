"""The meter: throughput (samples a second), and whether a progress report is due."""

from __future__ import annotations

import time

__all__ = ["Meter"]


class Meter:
    """Decides when progress is due and measures speed in between.

    Args:
        samples: Already counted, where a run continues.
        steps: Already done.
        interval_s: Least time between two reports in seconds.
    """

    def __init__(self, samples: int = 0, steps: int = 0, interval_s: float = 0.2) -> None:
        self._interval_s = interval_s
        self._last_s = time.perf_counter()
        self._last = samples, steps
        self._next_s = 0.0

    def due(self) -> bool:
        """Whether `interval_s` has passed since the last `read`. Cheap enough for every step."""
        return time.perf_counter() >= self._next_s

    def exclude(self, seconds: float) -> None:
        """Exclude `seconds` of pause or evaluation from the speed."""
        self._last_s += seconds

    def read(self, samples: int, steps: int) -> tuple[float, float, float]:
        """Samples a second, seconds a step, and seconds, all since the last call.

        Args:
            samples: Counted since the start.
            steps: Done since the start.
        """
        now_s = time.perf_counter()
        seconds = max(now_s - self._last_s, 1e-9)
        speed, step_s = (samples - self._last[0]) / seconds, seconds / max(steps - self._last[1], 1)
        self._last_s, self._last, self._next_s = now_s, (samples, steps), now_s + self._interval_s
        return speed, step_s, seconds

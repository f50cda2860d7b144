"""Hang detection: a run without a step for too long is diagnosed; its blocking ranks are replaced, or it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from nbdist.cluster.diagnose.where import Where
from nbdist.telemetry import RunState

__all__ = ["Hang", "Hangs"]

_NOT_STEPPING = ("paused", "recovering", "stopping")


class Hang(NamedTuple):
    """A detected hang.

    Args:
        text: For display: for how long, and which ranks wait for which, where.
        culprits: The ranks to replace; empty if the run is to end.
    """

    text: str
    culprits: list[int]


class Hangs:
    """Detects hangs of one run.

    Args:
        timeout_s: Seconds without a step, evaluation and the time before the first one included; None for no limit.
        on_hang: "replace" the ranks that the others wait for; if that is none, or all, the run ends as with
            "stop".
        where: Returns the stacks of all ranks.
    """

    def __init__(self, timeout_s: float | None, on_hang: str, where: Callable[[], Where]) -> None:
        self._timeout_s = timeout_s
        self._replace = on_hang == "replace"
        self._where = where
        self._steps: object = None
        self._since_s = 0.0

    def found(self, progress: RunState) -> Hang | None:
        """The hang, if there is one now; called in a loop during the run."""
        if self._timeout_s is None:
            return None
        steps, now_s = sum(rank.step for rank in progress.ranks.values()), time.monotonic()
        if steps != self._steps or progress.state in _NOT_STEPPING:
            self._steps, self._since_s = steps, now_s
        if now_s < self._since_s + self._timeout_s:
            return None
        self._since_s = now_s
        where = self._where()
        behind = [rank.rank for rank in where.ranks if rank.state not in ("waiting", "lost", "elsewhere")]
        culprits = behind if self._replace and len(behind) < len(where.ranks) else []
        return Hang(f"no step for {self._timeout_s:g} s: {where.verdict}", culprits)

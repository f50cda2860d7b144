"""Hang detection: a run without a step for too long is diagnosed; its blocking ranks are replaced, or it ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from nbdist.cluster.diagnose.where import Where
from nbdist.telemetry import RunState

__all__ = ["Hang", "Hangs"]

_NOT_STEPPING = ("paused", "recovering", "stopping")
_IN_A_STEP = ("running", "finished")
"""States of ranks that are not starting, evaluating or paused."""
_LEAST_S, _STEPS = 60.0, 20
"""Without a timeout of the user's: seconds without a step until the stacks are read, and how many of the slowest."""
_AGAIN_S = 5.0
"""After how many seconds the stacks have to say the same again."""


class Hang(NamedTuple):
    """A detected hang.

    Args:
        text: For display: for how long, and which ranks wait for which, where.
        culprits: The ranks to replace; empty if the run is to end.
        certain: Whether to act on it; else it is a note for the user, who alone knows.
    """

    text: str
    culprits: list[int]
    certain: bool = True


class Hangs:
    """Detects hangs of one run.

    Without a timeout, ranks are asked for their stacks once there was no step for the larger of a minute and 20 times
    the slowest step so far, from the second step on; not in evaluation or while paused. A hang is certain if two dumps
    say that all wait for each other, or for ranks that do nothing. If a rank is in the middle of something, the user
    gets a note, for it may be loading data.

    Args:
        timeout_s: Seconds without a step, evaluation and the time before the first one included, after which any run
            counts as hanging; None for the above, infinite for no limit.
        on_hang: "replace" the ranks that the others wait for; if that is none, or all, the run ends as with
            "stop".
        where: Returns the stacks of all ranks.
    """

    def __init__(self, timeout_s: float | None, on_hang: str, where: Callable[[], Where]) -> None:
        self._timeout_s = timeout_s
        self._replace = on_hang == "replace"
        self._where = where
        self._steps: object = None
        self._since_s = self._look_s = 0.0
        self._slowest_s = 0.0
        self._verdict = ""
        self._noted = False

    def found(self, progress: RunState) -> Hang | None:
        """The hang, if there is one now; called in a loop during the run."""
        steps, now_s = sum(rank.step for rank in progress.ranks.values()), time.monotonic()
        stepping = progress.state not in _NOT_STEPPING
        if self._timeout_s is None:
            stepping &= all(rank.state in _IN_A_STEP for rank in progress.ranks.values())
        if steps != self._steps or not stepping:
            took_s = now_s - self._since_s
            if stepping and self._steps is not None and took_s > self._slowest_s and self._least_steps(progress) > 1:
                self._slowest_s = took_s
            self._steps = steps if stepping else None
            self._since_s = self._look_s = now_s
            self._verdict, self._noted = "", False
        limit_s = max(_LEAST_S, _STEPS * self._slowest_s) if self._timeout_s is None else self._timeout_s
        if now_s < self._look_s + limit_s or (self._timeout_s is None and self._least_steps(progress) < 2):
            return None
        self._look_s = now_s
        where = self._where()
        if self._timeout_s is not None:
            return Hang(f"no step for {limit_s:g} s: {where.verdict}", self._culprits(where))
        return self._hang(where, now_s, limit_s)

    def _hang(self, where: Where, now_s: float, limit_s: float) -> Hang | None:
        """What the stacks say, if nobody has said when a run counts as hanging."""
        if where.interrupted:
            return None
        text = f"no step for {now_s - self._since_s:.0f} s: {where.verdict}"
        if where.stuck:
            if where.verdict == self._verdict:
                return Hang(text, self._culprits(where))
            self._verdict, self._look_s = where.verdict, now_s - limit_s + _AGAIN_S
            return None
        self._verdict = ""
        if self._noted:
            return None
        self._noted = True
        return Hang(text, [], certain=False)

    def _culprits(self, where: Where) -> list[int]:
        behind = [rank.rank for rank in where.ranks if rank.state not in ("waiting", "lost", "elsewhere")]
        return behind if self._replace and len(behind) < len(where.ranks) else []

    def _least_steps(self, progress: RunState) -> int:
        """The steps of every rank since it began."""
        return min((rank.step - rank.first_step for rank in progress.ranks.values()), default=0)

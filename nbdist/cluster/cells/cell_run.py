"""CellRun: one notebook cell running on several engines; output, results, errors, interrupts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

from nbdist.cluster.calls.pending_call import CallError, EngineDied, PendingCall
from nbdist.cluster.diagnose.where import Where
from nbdist.errors import EngineError, interrupted, ranks_text

__all__ = ["CellRun", "printed", "settle"]

_POLL_S = 0.05
_INTERRUPTED_AFTER_S = 5.0
_LATE_OUTPUT_S = 2.0
_CHECK_S, _LONGEST_CHECK_S = 3.0, 60.0
"""The first, and the longest, interval between checks whether a cell is deadlocked in collectives.

Each check sends every rank a signal, so a long cell is checked less and less often.
"""


def until_next_check(last_s: float, *, deadlocked: bool) -> float:
    """Seconds to the next check of a cell: soon if it seems deadlocked, as two equal stacks confirm it."""
    return _CHECK_S if deadlocked else min(2 * last_s, _LONGEST_CHECK_S)


def settle(call: PendingCall) -> None:
    """Wait for the output of a call that is done, which may arrive later."""
    call.wait_for_output(_LATE_OUTPUT_S)


def printed(calls: dict[int, PendingCall], stream: str) -> dict[int, str]:
    """What each rank's call has written so far to "stdout" or "stderr"."""
    return {rank: call.printed(stream) for rank, call in calls.items()}


class CellRun:
    """The same cell on several ranks.

    Args:
        calls: The call of each rank.
        interrupt: Interrupts the given ranks.
        failed: Called if the cell fails or is interrupted, with the calls that are still running.
        check_alive: Raises if no reply can come any more.
        done: Called at the end with the ranks on which the cell ran without an error.
        where: Returns the stacks of all ranks.
    """

    def __init__(
        self,
        calls: dict[int, PendingCall],
        interrupt: Callable[[list[int]], None],
        failed: Callable[[dict[int, PendingCall]], None],
        check_alive: Callable[[], None],
        done: Callable[[list[int]], None] = lambda ranks: None,
        where: Callable[[], Where] | None = None,
    ) -> None:
        self._calls = calls
        self._interrupt = interrupt
        self._failed = failed
        self._check_alive = check_alive
        self._done = done
        self._where = where

    @property
    def ranks(self) -> list[int]:
        """Where the cell runs."""
        return list(self._calls)

    def done(self) -> bool:
        """Whether every rank has answered."""
        return all(call.done() for call in self._calls.values())

    def printed(self, stream: str = "stdout") -> dict[int, str]:
        """What each rank has written so far to "stdout" or "stderr"."""
        return printed(self._calls, stream)

    def displays(self) -> dict[int, list[dict[str, Any]]]:
        """Rich outputs of each rank so far, as message contents with ``data`` and ``metadata``."""
        return {rank: call.displays() for rank, call in self._calls.items()}

    def results(self) -> dict[int, Any]:
        """The data of each rank's last expression, by MIME type, once done."""
        found = {rank: call.last_expression() for rank, call in self._calls.items()}
        return {rank: data for rank, data in found.items() if data}

    def wait(self, while_waiting: Callable[[], None] = lambda: None) -> None:
        """Wait until every rank is done.

        Args:
            while_waiting: Called in a loop meanwhile.

        Raises:
            EngineError: The cell failed on some rank.
            ClusterError: The engines cannot be reached any more.
            KeyboardInterrupt: It was interrupted; the ranks have been interrupted too.
        """
        try:
            self._wait(while_waiting)
            self._raise_first()
        except BaseException:
            self._failed({rank: call for rank, call in self._calls.items() if not call.done()})
            raise
        finally:
            self._done([rank for rank, call in self._calls.items() if call.succeeded])

    def _waiting(self) -> list[PendingCall]:
        return [call for call in self._calls.values() if not call.done()]

    def _wait(self, while_waiting: Callable[[], None]) -> None:
        check_s, interval_s, before = time.monotonic() + _CHECK_S, _CHECK_S, ""
        try:
            while waiting := self._waiting():
                while_waiting()
                waiting[0].wait(_POLL_S)
                self._check_alive()
                if self._where is not None and time.monotonic() > check_s:
                    where = self._where().among(self._calls)
                    interval_s = until_next_check(interval_s, deadlocked=where.deadlocked)
                    check_s = time.monotonic() + interval_s
                    if where.deadlocked and str(where) == before:
                        warnings.warn(f"this cell hangs: {where.verdict}. Interrupt it (■).", stacklevel=4)
                        self._where = None
                    before = str(where)
        except KeyboardInterrupt:
            self._interrupt([rank for rank, call in self._calls.items() if not call.done()])
            deadline = time.monotonic() + _INTERRUPTED_AFTER_S
            while (waiting := self._waiting()) and time.monotonic() < deadline:
                while_waiting()
                waiting[0].wait(_POLL_S)
            stuck = [rank for rank, call in self._calls.items() if not call.done()]
            if not stuck:
                raise interrupted("the ranks were interrupted; they keep their state.") from None
            raise interrupted(
                f"{ranks_text(stuck)} did not react, perhaps inside a collective: %dist_stop ends it."
            ) from None
        finally:
            for call in self._calls.values():
                if call.done():
                    settle(call)

    def _raise_first(self) -> None:
        errors = {rank: call.exception() for rank, call in self._calls.items()}
        failed = {rank: error for rank, error in errors.items() if isinstance(error, CallError)}
        if not failed:
            return
        first = next(iter(failed))
        cause = failed[first]
        same = [rank for rank, error in failed.items() if (error.kind, error.message) == (cause.kind, cause.message)]
        if isinstance(cause, EngineDied):
            raise EngineError(f"{ranks_text(same)}: the engine's process ended. %dist_start replaces it.", rank=first)
        others = [rank for rank in failed if rank not in same]
        also = f" ({ranks_text(others)} failed too: {failed[others[0]].kind})" if others else ""
        raise CallError(cause.kind, f"{cause.message}{also}", cause.traceback).as_error(ranks_text(same), first)

"""What engines answer to calls, waited for while they live."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ipyparallel

from nbdist.errors import ClusterError, EngineError

__all__ = ["answers_of"]

_LOOK_S = 0.1


def answers_of(calls: dict[int, Any], check_alive: Callable[[], None], timeout_s: float | None) -> dict[int, Any]:
    """Wait for the answers to calls, by rank.

    Args:
        calls: ipyparallel's results, by rank.
        check_alive: Called meanwhile; raises where no answer will come any more.
        timeout_s: How long to wait; None for as long as the engines live.

    Raises:
        ClusterError: An engine did not answer in time, or cannot be reached.
        EngineError: The function failed on one.
    """
    answers = {}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for rank, call in calls.items():
        while not call.wait(_LOOK_S):
            check_alive()
            if deadline is not None and time.monotonic() > deadline:
                raise ClusterError(f"rank {rank} did not answer within {timeout_s:g} s: %dist_stop ends it.")
        try:
            answers[rank] = call.get()
        except ipyparallel.error.RemoteError as error:
            raise EngineError(f"rank {rank}: {error.ename}: {error.evalue}", str(error.traceback), rank) from None
    return answers

"""Replies of engines to calls: wait for them, while checking that the engines are alive."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from nbdist.cluster.calls.pending_call import CallError, PendingCall
from nbdist.errors import ClusterError

__all__ = ["wait_for_replies"]

_LOOK_S = 0.1


def wait_for_replies(
    calls: Mapping[int, PendingCall], check_alive: Callable[[], None], timeout_s: float | None
) -> dict[int, Any]:
    """Wait for the replies to calls, by rank.

    Args:
        calls: The call of each rank.
        check_alive: Called in a loop; raises if no reply can come any more.
        timeout_s: How long to wait; None for no limit.

    Raises:
        ClusterError: An engine did not answer in time, or cannot be reached.
        EngineError: The function raised on an engine.
    """
    replies = {}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for rank, call in calls.items():
        while not call.wait(_LOOK_S):
            check_alive()
            if deadline is not None and time.monotonic() > deadline:
                raise ClusterError(f"rank {rank} did not answer within {timeout_s:g} s: %dist_stop ends it.")
        try:
            replies[rank] = call.result()
        except CallError as error:
            raise error.as_error(f"rank {rank}", rank) from None
    return replies

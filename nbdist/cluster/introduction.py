"""The first words with engines that were just started: they load torch, and say where they live."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from nbdist.cluster import entry
from nbdist.cluster.engine import Engine
from nbdist.errors import ClusterError

__all__ = ["introduce"]

_ASK_AGAIN_S = 1.0


def introduce(
    size: int,
    store: tuple[str, str],
    timeout_s: float,
    start_call: Callable[..., Any],
    call: Callable[..., dict[int, Any]],
) -> list[Engine]:
    """Let the engines of all ranks load torch and say where they live.

    Once in several hundred starts an engine never answered its first call. It counts as registered from its first
    heartbeat, so probably that call reached the controller before the engine's own connection did and was dropped. So
    each one is asked for a word, and again where none comes.

    Args:
        size: How many.
        store: Address of where the ranks will meet.
        timeout_s: How long they may take, in seconds.
        start_call: Begins to call a function on one rank.
        call: Calls a function on ranks and waits.

    Raises:
        ClusterError: An engine does not answer.
    """
    deadline = time.monotonic() + timeout_s
    for rank in range(size):
        heard = start_call(rank, entry.hear)
        while not heard.wait(_ASK_AGAIN_S):
            if time.monotonic() > deadline:
                raise ClusterError(f"rank {rank} did not answer within {timeout_s:g} s of its start.")
            heard = start_call(rank, entry.hear)
    facts = call(range(size), entry.hello, store, timeout_s=timeout_s)
    return [Engine(rank=rank, device="", **fact) for rank, fact in facts.items()]

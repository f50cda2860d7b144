"""Form a world: create the process group of all ranks, or fail on all; a failure releases the waiting ranks."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbdist.cluster.calls.pending_call import CallError, EngineDied, PendingCall
from nbdist.errors import ClusterError, EngineError, ranks_text

__all__ = ["Forming", "describe_engines"]

_ASK_AGAIN_S = 1.0
_LOOK_S = 0.05
_RELEASED_WITHIN_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Forming:
    """One attempt of the engines to form a world.

    Args:
        lost: Returns the ranks that have died.
        check_alive: Raises if the engines cannot be reached.
        release: Makes every rank that waits for others raise.
        kill: Kills ranks.
        timeout_s: How long the ranks may take, in seconds.
        calls: The call of `join` on each rank.
    """

    lost: Callable[[], list[int]]
    check_alive: Callable[[], None]
    release: Callable[[], None]
    kill: Callable[[list[int]], None]
    timeout_s: float
    calls: dict[int, PendingCall] = field(default_factory=dict)

    def wait(self) -> dict[int, Any]:
        """Wait for all ranks, or the first failure; returns what `join` returned on each rank.

        Raises:
            EngineError: It failed on a rank, or one was lost.
            ClusterError: They did not join in time.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            done, waiting = concurrent.futures.wait(
                self.calls.values(), _LOOK_S, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            if any(call.exception() for call in done):
                self.abort()
                raise self._cause()
            if not waiting:
                return {rank: call.result() for rank, call in self.calls.items()}
            if lost := self.lost():
                raise _lost(lost)
            self.check_alive()
            if time.monotonic() > deadline:
                late = [rank for rank, call in self.calls.items() if call in waiting]
                raise ClusterError(f"{ranks_text(late)} did not join the others within {self.timeout_s:g} s.")

    def abort(self) -> None:
        """Release the ranks that wait for others, and kill those that do not react."""
        self.release()
        concurrent.futures.wait(self.calls.values(), _RELEASED_WITHIN_S)
        self.kill([rank for rank, call in self.calls.items() if not call.done()])

    def _cause(self) -> EngineError:
        """The first failure: the errors of the released ranks are only secondary."""
        failed = {
            rank: error
            for rank, call in self.calls.items()
            if call.done() and isinstance(error := call.exception(), CallError)
        }  # fmt: skip
        if lost := [rank for rank, error in failed.items() if isinstance(error, EngineDied)]:
            return _lost(lost)
        rank = min(failed, key=lambda rank: failed[rank].kind == "PeerLostError")
        return failed[rank].as_error(f"rank {rank}", rank)


def _lost(ranks: list[int]) -> EngineError:
    return EngineError(f"{ranks_text(ranks)}: the process ended while the ranks formed a world.", rank=ranks[0])


def describe_engines(
    size: int,
    store: tuple[str, str],
    timeout_s: float,
    start_call: Callable[..., PendingCall],
    call: Callable[..., dict[int, Any]],
) -> dict[int, dict[str, Any]]:
    """Let the engines of all ranks load torch, and return how they describe themselves, by rank.

    Once in several hundred starts an engine never answered its first call. It counts as registered from its first
    heartbeat, so probably that call reached the controller before the engine's own connection did and was dropped. So
    each engine is pinged, and again if no answer comes.

    Args:
        size: The number of ranks.
        store: Address of the store, for the rendezvous.
        timeout_s: How long they may take, in seconds.
        start_call: Starts a function call on one rank.
        call: Calls a function on ranks and waits.

    Raises:
        ClusterError: An engine does not answer.
    """
    deadline = time.monotonic() + timeout_s
    for rank in range(size):
        reply = start_call(rank, "ping")
        while not reply.wait(_ASK_AGAIN_S):
            if time.monotonic() > deadline:
                raise ClusterError(f"rank {rank} did not answer within {timeout_s:g} s of its start.")
            reply = start_call(rank, "ping")
    return call(range(size), "describe", store, timeout_s=timeout_s)

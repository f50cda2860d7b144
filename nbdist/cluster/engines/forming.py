"""All ranks meet in a new world, or none does: a failure on one frees the others."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nbdist.cluster.engines.engine import Engine
from nbdist.errors import ClusterError, EngineError, ranks_text

__all__ = ["Forming", "introduce"]

_ASK_AGAIN_S = 1.0
_LOOK_S = 0.05
_LET_GO_WITHIN_S = 2.0


@dataclass(frozen=True, kw_only=True)
class Forming:
    """One attempt of the engines to form a world.

    Args:
        lost: Asks which ranks have died.
        check_alive: Raises where the engines cannot be reached.
        release: Lets every rank that waits for others have an error.
        kill: Ends ranks.
        timeout_s: How long the ranks may take, in seconds.
        calls: ipyparallel's result of each rank that was asked to join.
    """

    lost: Callable[[], list[int]]
    check_alive: Callable[[], None]
    release: Callable[[], None]
    kill: Callable[[list[int]], None]
    timeout_s: float
    calls: dict[int, Any] = field(default_factory=dict)

    def wait(self) -> dict[int, Any]:
        """Wait for all ranks, or the first failure; returns what each one told.

        Raises:
            EngineError: It failed on a rank, or one was lost.
            ClusterError: They did not meet in time.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            done, waiting = concurrent.futures.wait(
                self.calls.values(), _LOOK_S, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            if any(call.exception() for call in done):
                self.give_up()
                raise self._cause()
            if not waiting:
                return {rank: call.get() for rank, call in self.calls.items()}
            if lost := self.lost():
                raise _lost(lost)
            self.check_alive()
            if time.monotonic() > deadline:
                late = [rank for rank, call in self.calls.items() if call in waiting]
                raise ClusterError(f"{ranks_text(late)} did not meet the others within {self.timeout_s:g} s.")

    def give_up(self) -> None:
        """Free the ranks that wait for others, and kill those that do not notice."""
        self.release()
        concurrent.futures.wait(self.calls.values(), _LET_GO_WITHIN_S)
        self.kill([rank for rank, call in self.calls.items() if not call.done()])

    def _cause(self) -> EngineError:
        """What went wrong first: that others were freed is only its echo."""
        failed = {
            rank: error
            for rank, call in self.calls.items()
            if call.done() and (error := call.exception()) is not None
        }  # fmt: skip
        kinds = {rank: getattr(error, "ename", type(error).__name__) for rank, error in failed.items()}
        lost = [rank for rank, kind in kinds.items() if kind == "EngineError"]  # ipyparallel's word for one that died
        if lost:
            return _lost(lost)
        rank = min(failed, key=lambda rank: kinds[rank] == "PeerLostError")
        words = getattr(failed[rank], "evalue", str(failed[rank]))
        return EngineError(f"rank {rank}: {kinds[rank]}: {words}", str(getattr(failed[rank], "traceback", "")), rank)


def _lost(ranks: list[int]) -> EngineError:
    return EngineError(f"{ranks_text(ranks)}: the process ended while the ranks met.", rank=ranks[0])


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
        heard = start_call(rank, "ping")
        while not heard.wait(_ASK_AGAIN_S):
            if time.monotonic() > deadline:
                raise ClusterError(f"rank {rank} did not answer within {timeout_s:g} s of its start.")
            heard = start_call(rank, "ping")
    facts = call(range(size), "describe", store, timeout_s=timeout_s)
    return [Engine(rank=rank, device="", **fact) for rank, fact in facts.items()]

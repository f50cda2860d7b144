"""Spare engines: processes with torch loaded and no rank, which replace lost engines at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

import psutil

from nbdist.cluster.calls.pending_call import CallError, EngineDied, PendingCall
from nbdist.cluster.launch.launcher import Launch
from nbdist.errors import ClusterError
from nbdist.process_mark import alive

__all__ = ["Spares"]

_ASK_AGAIN_S = 1.0
_POLL_S = 0.005
_TRIES = 3


class Spares:
    """The engines without a rank, started ahead.

    An engine may miss its first call: it counts as registered from its first heartbeat, so that call can reach the
    controller before the engine's own connection does. So the call is repeated if no answer comes.

    Args:
        launch: Starts engines.
        wanted: How many spares to hold ready.
        store: Address of the store, for the rendezvous.
    """

    def __init__(self, launch: Launch, wanted: int, store: tuple[str, str]) -> None:
        self.wanted = wanted
        self._store = store
        self._launch = launch
        self._calls: dict[int, tuple[PendingCall, float]] = {}
        self._facts: dict[int, dict[str, Any]] = {}
        self._dead: set[int] = set()  # engine ids that the controller may still list

    def mark_dead(self, engine_id: int) -> None:
        """Exclude a dead engine from the spares."""
        self._dead.add(engine_id)

    def ready(self, ranked: Collection[int]) -> dict[int, dict[str, Any]]:
        """The spares that have described themselves, by engine id; calls `describe` on new ones, without waiting.

        Args:
            ranked: Ids of the engines that have a rank.

        Raises:
            EngineError: One cannot load torch.
        """
        free = set(self._launch.client.ids) - set(ranked) - self._dead
        self._calls = {engine_id: call for engine_id, call in self._calls.items() if engine_id in free}
        self._facts = {
            engine_id: facts
            for engine_id, facts in self._facts.items()
            if engine_id in free and not self._gone(facts)
        }  # fmt: skip
        for engine_id in sorted(free - set(self._facts)):
            call, called_s = self._calls.get(engine_id, (None, 0.0))
            if call is not None and call.done():
                del self._calls[engine_id]
                self._receive(engine_id, call)
            elif time.monotonic() - called_s > _ASK_AGAIN_S:
                with contextlib.suppress(EngineDied):  # just now
                    call = self._launch.client.start_call(engine_id, "describe", *self._store)
                    self._calls[engine_id] = call, time.monotonic()
        return dict(self._facts)

    def count(self, ranked_pids: Collection[int]) -> int:
        """How many spares there are: ready, called, or still starting."""
        known = {*ranked_pids, *(facts["pid"] for facts in self._facts.values())}
        return len(self._facts) + len(self._launch.pids() - known)

    def refill(self, ranked: Collection[int], ranked_pids: Collection[int]) -> None:
        """Start missing spares, without waiting for them; kill surplus ones."""
        ready = self.ready(ranked)
        missing = self.wanted - self.count(ranked_pids)
        if missing > 0:
            self._launch.add(missing)
        for engine_id in list(ready)[: max(0, -missing)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(ready[engine_id]["pid"]).kill()
            self._dead.add(engine_id)

    def take(
        self,
        count: int,
        ranked: Collection[int],
        ranked_pids: Collection[int],
        timeout_s: float,
        report: Callable[[str], None],
        ended: Callable[[], bool],
    ) -> dict[int, dict[str, Any]]:
        """Take `count` spares, by engine id; if there are too few, start new ones and wait.

        Args:
            count: How many.
            ranked: Ids of the engines that have a rank.
            ranked_pids: Their processes.
            timeout_s: How long to wait.
            report: Called with how many are ready.
            ended: Whether to give up.

        Raises:
            ClusterError: They were not ready in time, or ended while they started.
        """
        deadline = time.monotonic() + timeout_s
        tries = _TRIES
        while len(ready := self.ready(ranked)) < count:
            missing = count - self.count(ranked_pids)
            if missing > 0:
                if not tries:
                    raise ClusterError(f"an engine ended while it started:\n{self._launch.log_tail()}")
                tries -= 1
                self._launch.add(missing)
            if ended():
                raise ClusterError("the engines were stopped while lost ones were replaced.")
            if time.monotonic() > deadline:
                raise ClusterError(f"only {len(ready)} of {count} new engines were ready after {timeout_s:g} s.")
            report(f"{len(ready)} of {count} new engines are ready")
            calls = [call for call, _ in self._calls.values()]
            if calls:
                calls[0].wait(_POLL_S)
            else:
                time.sleep(_POLL_S)
        taken = dict(list(ready.items())[:count])
        for engine_id in taken:
            del self._facts[engine_id]
        return taken

    def _receive(self, engine_id: int, call: PendingCall) -> None:
        try:
            facts = call.result()
        except CallError as error:
            self._dead.add(engine_id)
            if not isinstance(error, EngineDied):
                raise error.as_error("a new engine") from None
        else:
            if not self._gone(facts):
                self._facts[engine_id] = facts

    def _gone(self, facts: dict[str, Any]) -> bool:
        return facts["host_id"] == self._launch.host_id and not alive(facts["mark"])

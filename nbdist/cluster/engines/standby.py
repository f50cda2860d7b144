"""Spares: engines without a rank, with torch loaded, that take the place of lost ones at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection
from typing import Any

import ipyparallel.error
import psutil

from nbdist.cluster.engines.engine import gone
from nbdist.cluster.launch.launcher import Launch
from nbdist.engine import trampoline
from nbdist.errors import ClusterError, EngineError

__all__ = ["Spares"]

_ASK_AGAIN_S = 1.0
_POLL_S = 0.005
_TRIES = 3


class Spares:
    """What is known of the engines that have no rank. They are started ahead, so that a lost one is replaced at once.

    An engine may miss the first call of its life: it counts as registered from its first heartbeat, so that call can
    reach the controller before the engine's own connection does. So it is asked again where no answer comes.

    Args:
        launch: Where engines come from.
        wanted: How many to keep.
        store: Address of the store at which the ranks will meet.
    """

    def __init__(self, launch: Launch, wanted: int, store: tuple[str, str]) -> None:
        self.wanted = wanted
        self._store = store
        self._launch = launch
        self._calls: dict[int, tuple[Any, float]] = {}
        self._facts: dict[int, dict[str, Any]] = {}
        self._left: set[int] = set()  # had a rank and are dead, which the controller may not know yet

    def leave(self, engine_id: int) -> None:
        """Note that an engine is dead: it will never be a spare."""
        self._left.add(engine_id)

    def ready(self, ranked: Collection[int]) -> dict[int, dict[str, Any]]:
        """The spares that have said where they live, by engine id; gets acquainted with new ones without waiting.

        Args:
            ranked: Ids of the engines that have a rank.

        Raises:
            EngineError: One cannot load torch.
        """
        free = set(self._launch.ids) - set(ranked) - self._left
        self._calls = {engine_id: call for engine_id, call in self._calls.items() if engine_id in free}
        self._facts = {
            engine_id: facts
            for engine_id, facts in self._facts.items()
            if engine_id in free and not self._gone(facts)
        }  # fmt: skip
        for engine_id in sorted(free - set(self._facts)):
            call, asked_s = self._calls.get(engine_id, (None, 0.0))
            if call is not None and call.ready():
                del self._calls[engine_id]
                self._hear(engine_id, call)
            elif time.monotonic() - asked_s > _ASK_AGAIN_S:
                with contextlib.suppress(IndexError):  # it has just ended
                    again = self._launch.client[engine_id].apply_async(trampoline.run, "describe", *self._store)
                    self._calls[engine_id] = again, time.monotonic()
        return dict(self._facts)

    def coming(self, ranked_pids: Collection[int]) -> int:
        """How many there are or will be: ready, asked, or still starting."""
        known = {*ranked_pids, *(facts["pid"] for facts in self._facts.values())}
        return len(self._facts) + len(self._launch.pids() - known)

    def refill(self, ranked: Collection[int], ranked_pids: Collection[int]) -> None:
        """Start as many as are missing, without waiting for them; end those that are too many."""
        ready = self.ready(ranked)
        missing = self.wanted - self.coming(ranked_pids)
        if missing > 0:
            self._launch.add(missing)
        for engine_id in list(ready)[: max(0, -missing)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(ready[engine_id]["pid"]).kill()
            self._left.add(engine_id)

    def take(
        self,
        count: int,
        ranked: Collection[int],
        ranked_pids: Collection[int],
        timeout_s: float,
        tell: Callable[[str], None],
        ended: Callable[[], bool],
    ) -> dict[int, dict[str, Any]]:
        """Take `count` spares, by engine id; where there are too few, wait for new ones.

        Args:
            count: How many.
            ranked: Ids of the engines that have a rank.
            ranked_pids: Their processes.
            timeout_s: How long to wait.
            tell: Told how many are ready.
            ended: Whether to give up.

        Raises:
            ClusterError: They were not ready in time, or ended while they started.
        """
        deadline = time.monotonic() + timeout_s
        tries = _TRIES
        while len(ready := self.ready(ranked)) < count:
            missing = count - self.coming(ranked_pids)
            if missing > 0:
                if not tries:
                    raise ClusterError(f"an engine ended while it started:\n{self._launch.log_tail()}")
                tries -= 1
                self._launch.add(missing)
            if ended():
                raise ClusterError("the engines were stopped while lost ones were replaced.")
            if time.monotonic() > deadline:
                raise ClusterError(f"only {len(ready)} of {count} new engines were ready after {timeout_s:g} s.")
            tell(f"{len(ready)} of {count} new engines are ready")
            calls = [call for call, _ in self._calls.values()]
            if calls:
                calls[0].wait(_POLL_S)
            else:
                time.sleep(_POLL_S)
        taken = dict(list(ready.items())[:count])
        for engine_id in taken:
            del self._facts[engine_id]
        return taken

    def _hear(self, engine_id: int, call: Any) -> None:
        try:
            facts = call.get()
        except ipyparallel.error.RemoteError as error:
            self._left.add(engine_id)
            if error.ename != "EngineError":  # ipyparallel's word for an engine that died
                raise EngineError(f"a new engine: {error.ename}: {error.evalue}", str(error.traceback)) from None
        else:
            if not self._gone(facts):
                self._facts[engine_id] = facts

    def _gone(self, facts: dict[str, Any]) -> bool:
        return facts["host_id"] == self._launch.host_id and gone(facts["pid"], facts["born_s"])

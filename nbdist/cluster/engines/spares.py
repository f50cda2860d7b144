"""Spare engines: processes with torch loaded and no rank, which replace lost engines at once."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

from nbdist.cluster.calls.pending_call import CallError, EngineDied, PendingCall
from nbdist.cluster.hosts.host import HostLostError
from nbdist.cluster.launch.launcher import Launch
from nbdist.errors import ClusterError

__all__ = ["Process", "Spares"]

Process = tuple[str, str]
"""Host id and mark of an engine's process."""

_ASK_AGAIN_S = 1.0
_POLL_S = 0.005
_TRIES = 3


class Spares:
    """The engines without a rank, started ahead.

    An engine may miss its first call: it counts as registered from its first heartbeat, so that call can reach the
    controller before the engine's own connection does. So the call is repeated if no answer comes.

    Args:
        launch: Starts engines.
        wanted: How many spares to hold ready on each host.
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

    def on_host(self, host_id: str) -> list[int]:
        """The ids of the spares on a host."""
        return [engine_id for engine_id, facts in list(self._facts.items()) if facts["host_id"] == host_id]

    def hosts(self, ranked: Collection[Process]) -> list[str]:
        """The host of each spare that there is: ready, called, or still starting."""
        ready = {(facts["host_id"], facts["mark"]) for facts in self._facts.values()}
        return [host for host, _ in [*ready, *(self._launch.processes() - {*ranked, *ready})]]

    def refill(self, ranked: Collection[int], processes: Collection[Process]) -> set[Process]:
        """Start missing spares on each host, without waiting for them; kill surplus ones. Returns what was started."""
        ready, present, started = self.ready(ranked), self.hosts(processes), set[Process]()
        for host in self._launch.living():
            host_id = host.facts.host_id
            missing = self.wanted - present.count(host_id)
            if missing > 0:
                started |= self._launch.add(missing, [host_id] * missing)
            surplus = [engine_id for engine_id, facts in ready.items() if facts["host_id"] == host_id]
            for engine_id in surplus[: max(0, -missing)]:
                host.send_signal(ready[engine_id]["mark"], signal.SIGKILL)
                self._dead.add(engine_id)
        return started

    def take(
        self,
        places: Sequence[str],
        ranked: Collection[int],
        processes: Collection[Process],
        timeout_s: float,
        report: Callable[[str], None],
        ended: Callable[[], bool],
    ) -> list[tuple[int, dict[str, Any]]]:
        """Take a spare for each place, with its engine id; if there are too few, start new ones and wait.

        Args:
            places: Ids of the hosts that they should be on; where there is none, one of another host is taken.
            ranked: Ids of the engines that have a rank.
            processes: Their processes.
            timeout_s: How long to wait.
            report: Called with how many are ready.
            ended: Whether to give up.

        Raises:
            ClusterError: They were not ready in time, or ended while they started.
        """
        deadline = time.monotonic() + timeout_s
        tries = _TRIES
        while True:
            if ended():  # before engines are started that nobody would end
                raise ClusterError("the engines were stopped while lost ones were replaced.")
            ready = self.ready(ranked)
            if missing := self._missing(places, self.hosts(processes)):
                if not tries:
                    raise ClusterError(f"an engine ended while it started:\n{self._launch.log_tail()}")
                tries -= 1
                with contextlib.suppress(HostLostError):  # just now: the next try does without it
                    self._launch.add(len(missing), missing)
            elif not self._missing(places, [facts["host_id"] for facts in ready.values()]):
                break
            if time.monotonic() > deadline:
                raise ClusterError(f"only {len(ready)} of {len(places)} new engines were ready after {timeout_s:g} s.")
            report(f"{len(ready)} of {len(places)} new engines are ready")
            calls = [call for call, _ in self._calls.values()]
            if calls:
                calls[0].wait(_POLL_S)
            else:
                time.sleep(_POLL_S)
        living, taken = self._living(), dict[int, tuple[int, dict[str, Any]]]()
        for number in sorted(range(len(places)), key=lambda number: places[number] not in living):
            fitting = [engine_id for engine_id, facts in ready.items() if facts["host_id"] == places[number]]
            engine_id = (fitting or list(ready))[0]
            taken[number] = engine_id, ready.pop(engine_id)
            del self._facts[engine_id]
        return [taken[number] for number in range(len(places))]

    def _living(self) -> set[str]:
        return {host.facts.host_id for host in self._launch.living()}

    def _missing(self, places: Sequence[str], present: Sequence[str]) -> list[str]:
        """Places for which there is no spare: those of living hosts, then any, for those of lost ones."""
        left, living = list(present), self._living()
        missing = []
        for place in places:
            if place in left:
                left.remove(place)
            else:
                missing.append(place if place in living else "")
        return [place for place in missing if place] + [""] * max(0, missing.count("") - len(left))

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
        return not self._launch.runs(facts["host_id"], facts["mark"])

"""Rank table: which engine has which rank, and which of them live."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nbdist.cluster.engines.engine_info import Engine
from nbdist.cluster.launch.launcher import Launch

__all__ = ["RankTable"]

_ENGINES_A_LOOK = 64
"""At five looks a second, 1,024 engines are looked at in three seconds."""
_REPORTED_WITHIN_S = 1.0
"""How long the controller may take to report the death of an engine whose process has ended."""


class RankTable:
    """The engine of each rank. Other threads read it while it changes: ids and records are replaced in one assignment.

    Args:
        launch: The engines' processes.
        size: The number of ranks: the first engines have them, until `place`.
    """

    def __init__(self, launch: Launch, size: int) -> None:
        self._launch = launch
        self._by_rank: tuple[list[int], list[Engine]] = sorted(launch.client.ids)[:size], []
        self._ended_s: dict[int, float] = {}  # since when, of engines that the controller still counts as alive
        self._turn = 0

    @property
    def ids(self) -> list[int]:
        """The id of each rank's engine."""
        return self._by_rank[0]

    @property
    def records(self) -> list[Engine]:
        """The record of each rank's engine, without its present state."""
        return self._by_rank[1]

    def place(self, engines: Sequence[tuple[int, Engine]]) -> None:
        """Give ranks to engines, in this order: their ids and records."""
        ids, records = zip(*engines, strict=True)
        self._by_rank = list(ids), [replace(record, rank=rank) for rank, record in enumerate(records)]

    def place_first(self, facts: dict[int, dict[str, Any]]) -> None:
        """Give ranks to the first engines, those of a host together.

        Args:
            facts: How the engines describe themselves, by their present rank.
        """
        host_ids = [host.facts.host_id for host in self._launch.hosts.values()]
        found = [(engine_id, self.record(facts[rank])) for rank, engine_id in enumerate(self.ids)]
        self.place(sorted(found, key=lambda engine: host_ids.index(engine[1].host_id)))

    @staticmethod
    def record(facts: dict[str, Any]) -> Engine:
        """The record of an engine without a rank."""
        return Engine(rank=-1, device="", **facts)

    def states(self, *, busy: bool) -> list[Engine]:
        """The record of each rank's engine now; `busy`: whether those alive are busy or idle."""
        (ids, records), registered = self._by_rank, set(self._launch.client.ids)
        state = "busy" if busy else "idle"
        return [
            replace(record, state=state if self._lives(engine_id, record, registered) else "lost")
            for engine_id, record in zip(ids, records, strict=True)
        ]

    def living(self) -> dict[int, tuple[int, Engine]]:
        """Id and record of the engine of each rank that is not lost."""
        (ids, records), registered = self._by_rank, set(self._launch.client.ids)
        pairs = enumerate(zip(ids, records, strict=True))
        return {rank: pair for rank, pair in pairs if self._lives(*pair, registered)}

    @property
    def by_host(self) -> dict[str, list[int]]:
        """The ranks on each host, by its id."""
        found: dict[str, list[int]] = {}
        for record in self.records:
            found.setdefault(record.host_id, []).append(record.rank)
        return found

    def on_host(self, host_id: str) -> list[int]:
        """The ids of the engines on a host."""
        ids, records = self._by_rank
        return [engine_id for engine_id, record in zip(ids, records, strict=False) if record.host_id == host_id]

    def declare_ended(self) -> None:
        """Declare engines dead whose process has ended, where the controller does not report it: a nanny may fail.

        Each call looks at the next `_ENGINES_A_LOOK` in turn.
        """
        (ids, records), registered, now_s = self._by_rank, set(self._launch.client.ids), time.monotonic()
        count = min(len(ids), len(records))  # they may be changing
        looked_at = range(self._turn, self._turn + min(count, _ENGINES_A_LOOK))
        self._turn = looked_at.stop % count if count else 0
        for engine_id, record in ((ids[i % count], records[i % count]) for i in looked_at):
            if engine_id not in registered or self._launch.runs(record.host_id, record.mark):
                continue
            if now_s - self._ended_s.setdefault(engine_id, now_s) > _REPORTED_WITHIN_S:
                self._launch.client.declare_dead([engine_id])

    def _lives(self, engine_id: int, record: Engine, registered: set[int]) -> bool:
        """Whether an engine is registered, and its process has not ended, as far as is known."""
        return engine_id in registered and self._launch.runs(record.host_id, record.mark)

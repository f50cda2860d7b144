"""Rank boards: the status boards of a run's ranks, each in the memory of its rank's host.

What a look at them costs does not grow with the number of ranks: of many ranks, each look is at the next few in turn.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any

from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.hosts.host import Host
from nbdist.core.transfer.payload import Segment
from nbdist.engine.state_publisher import StatePublisher
from nbdist.engine.status_board import BOARD_BYTES, BoardReader, MappedReader
from nbdist.errors import ClusterError
from nbdist.telemetry.record import records

__all__ = ["RANKS_A_LOOK", "RankBoards"]

RANKS_A_LOOK = 32
"""At five looks a second, what is known of 1,024 ranks is at most seven seconds old."""
_INTERVAL_S = 0.15  # ranks publish five times a second


class RankBoards:
    """Reads the states of the ranks of one run, as they are placed now. Used by one thread.

    Args:
        engines: Of the run.
        paths: The boards that another kernel has made; by default they are made.

    Attributes:
        publisher: Its counterpart, for the engines.
        paths: Of the boards, for another kernel.
    """

    def __init__(self, engines: Engines, paths: Sequence[str] = ()) -> None:
        far: dict[Host, list[int]] = {}
        made: dict[int, str] = dict(enumerate(paths))
        parts: list[_BoardHere | _FarBoards] = []
        for rank, host in engines.placed().items():
            if host is not None and not host.here:
                far.setdefault(host, []).append(rank)
            else:
                parts.append(_BoardHere(rank, engines, made.get(rank, "")))
        parts += [
            _FarBoards(host, ranks, {rank: made[rank] for rank in ranks if rank in made}) for host, ranks in far.items()
        ]
        self._parts = sorted(parts, key=lambda part: min(part.paths))
        self._turn, self._due_s = 0, 0.0
        self._looked_at = self._begin_next()
        made = {rank: path for part in self._parts for rank, path in part.paths.items()}
        self.paths = [made[rank] for rank in range(engines.size)]
        self.publisher = StatePublisher(records().resolve(), engines.host_id, tuple(self.paths))

    def read(self) -> dict[int, list[dict[str, Any]]]:
        """The states that ranks have published since they were last looked at; each rank's newest last.

        They are for `RankState.from_dict`. Each look is at rank 0, which has the curves and the history, and at the
        next ranks in turn, about `RANKS_A_LOOK` in all; ranks of one host are looked at together. Looks
        that follow each other closely are at rank 0 alone.
        """
        found = {
            rank: [json.loads(data) for data in new] for part in self._looked_at for rank, new in part.take().items()
        }
        self._looked_at = self._begin_next()
        return found

    def _begin_next(self) -> list[_BoardHere | _FarBoards]:
        chosen = dict.fromkeys(self._parts[:1])
        due = time.monotonic() >= self._due_s
        if due:
            self._due_s = time.monotonic() + _INTERVAL_S
        while due and len(chosen) < len(self._parts) and sum(len(part.paths) for part in chosen) < RANKS_A_LOOK:
            chosen.setdefault(self._parts[self._turn])
            self._turn = (self._turn + 1) % len(self._parts)
        for part in chosen:
            part.begin()
        return list(chosen)

    def close(self) -> None:
        """Free the boards."""
        for part in self._parts:
            part.close()


class _BoardHere:
    """The board of a rank whose memory this process can map."""

    def __init__(self, rank: int, engines: Engines, path: str) -> None:
        self._segment = Segment(BOARD_BYTES, engines.anchor, path)
        self._rank, self._reader = rank, MappedReader(self._segment.path)
        self.paths = {rank: self._segment.path}

    def begin(self) -> None:
        """Reading takes no time."""

    def take(self) -> dict[int, list[bytes]]:
        """What has been written since the last call."""
        return {self._rank: self._reader.read()}

    def close(self) -> None:
        self._segment.close()


class _FarBoards:
    """The boards of ranks on another host, read with one message for all of them; never waits."""

    def __init__(self, host: Host, ranks: list[int], paths: dict[int, str]) -> None:
        self._host = host
        self.paths = paths or dict.fromkeys(ranks, "")
        if not paths:
            with contextlib.suppress(ClusterError):  # it is lost: so are its ranks
                self.paths = dict(zip(ranks, host.hold(len(ranks)), strict=True))
        self._readers = {rank: BoardReader() for rank in ranks}
        self._due_s = 0.0
        self._pending: concurrent.futures.Future[list[bytes]] | None = None

    def begin(self) -> None:
        """Request what is there, unless that is under way, or was a moment ago."""
        if self._pending is None and time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _INTERVAL_S
            self._pending = self._host.begin_read([
                (self.paths[rank], start, length)
                for rank, reader in self._readers.items()
                for start, length in reader.places
            ])  # fmt: skip

    def take(self) -> dict[int, list[bytes]]:
        """What has come since the last call."""
        if self._pending is None or not self._pending.done():
            return {}
        read, self._pending = self._pending, None
        if read.exception() is not None:
            return {}
        contents = iter(read.result())
        return {rank: reader.new([next(contents) for _ in reader.places]) for rank, reader in self._readers.items()}

    def close(self) -> None:
        self._host.release([path for path in self.paths.values() if path])

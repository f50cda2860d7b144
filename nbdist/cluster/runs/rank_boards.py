"""Rank boards: the status boards of a run's ranks, each in the memory of its rank's host."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.hosts.host import Host
from nbdist.core.transfer.payload import Segment
from nbdist.engine.state_publisher import StatePublisher
from nbdist.engine.status_board import BOARD_BYTES, BoardReader, MappedReader
from nbdist.errors import ClusterError
from nbdist.telemetry.record import records

__all__ = ["RankBoards"]

_INTERVAL_S = 0.1


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
        self._segments: list[Segment] = []
        self._readers: dict[int, Callable[[], Iterable[bytes]]] = {}
        far: dict[Host, list[int]] = {}
        made: dict[int, str] = dict(enumerate(paths))
        for rank, host in engines.placed().items():
            if host is not None and not host.here:
                far.setdefault(host, []).append(rank)
                continue
            self._segments.append(segment := Segment(BOARD_BYTES, engines.anchor, made.get(rank, "")))
            made[rank] = segment.path
            self._readers[rank] = MappedReader(segment.path).read
        self._hosts: list[_FarBoards] = []
        for host, ranks in far.items():
            boards = _FarBoards(host, ranks, {rank: made[rank] for rank in ranks if rank in made})
            self._hosts.append(boards)
            made |= boards.paths
            self._readers |= {rank: functools.partial(boards.take, rank) for rank in ranks}
        self.paths = [made[rank] for rank in range(engines.size)]
        self.publisher = StatePublisher(records().resolve(), engines.host_id, tuple(self.paths))

    def read(self, rank: int) -> list[dict[str, Any]]:
        """The states that a rank has published since the last call, for `RankState.from_dict`; the newest last."""
        return [json.loads(data) for data in self._readers[rank]()]

    def close(self) -> None:
        """Free the boards."""
        for segment in self._segments:
            segment.close()
        for boards in self._hosts:
            boards.close()


class _FarBoards:
    """The boards of ranks on another host, read with one message for all of them; never waits."""

    def __init__(self, host: Host, ranks: list[int], paths: dict[int, str]) -> None:
        self._host = host
        self.paths = paths or dict.fromkeys(ranks, "")
        if not paths:
            with contextlib.suppress(ClusterError):  # it is lost: so are its ranks
                self.paths = dict(zip(ranks, host.hold(len(ranks)), strict=True))
        self._readers = {rank: BoardReader() for rank in ranks}
        self._found: dict[int, collections.deque[bytes]] = {rank: collections.deque() for rank in ranks}
        self._due_s = 0.0
        self._pending: concurrent.futures.Future[list[bytes]] | None = None

    def refresh(self) -> None:
        """Take what has come, and ask for more."""
        if self._pending is not None and not self._pending.done():
            return
        if self._pending is not None and self._pending.exception() is None:
            contents = iter(self._pending.result())
            for rank, reader in self._readers.items():
                self._found[rank].extend(reader.new([next(contents) for _ in reader.places]))
        places = [
            (self.paths[rank], start, length)
            for rank, reader in self._readers.items()
            for start, length in reader.places
        ]
        self._pending = self._host.begin_read(places)

    def take(self, rank: int) -> Iterable[bytes]:
        """What has come of a rank since the last call."""
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _INTERVAL_S
            self.refresh()
        found = list(self._found[rank])
        self._found[rank].clear()
        return found

    def close(self) -> None:
        self._host.release([path for path in self.paths.values() if path])

"""Snapshots of ranks on several hosts: each rank writes on its host, and the newest whole one is copied to this one.

A host's memory is lost with it, and a snapshot is whole with the buffers of all ranks, or of a replica that stands
alone (`core/state/replica.py`). So a thread copies whole snapshots from the hosts to the notebook's, where
`SnapshotStore` has them as if ranks had written them here. A run that resumes from one gets it on every host first.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.hosts.host import Host
from nbdist.core.state.snapshot import BUFFERS_PER_RANK, HEAD_BYTES, Head, SnapshotBuffer, SnapshotStore, newest_whole
from nbdist.errors import ClusterError

__all__ = ["HostSnapshots"]

_INTERVAL_S = 0.25
_INTERVAL_FACTOR = 20
"""Time between copies, as a multiple of how long the last one took."""


class HostSnapshots(SnapshotStore):
    """See `SnapshotStore`, which has the copies. Local to the kernel; thread-safe.

    Args:
        engines: Of the run.
        paths: See `SnapshotStore`.
        elsewhere: Of the store of an earlier kernel.
    """

    def __init__(
        self, engines: Engines, paths: Sequence[Sequence[str]] = (),
        elsewhere: Mapping[str, list[list[str]]] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self._engines = engines
        self._written: dict[Host, list[list[str]]] = {}  # each rank's buffers
        self._copying = threading.RLock()
        self._closed = threading.Event()
        for host in engines.hosts:
            if host.name in elsewhere:
                self._written[host] = elsewhere[host.name]
        super().__init__(engines.size, engines.anchor, paths)
        threading.Thread(target=self._follow, daemon=True, name="nbdist-snapshots").start()

    def grow(self, ranks: int) -> None:
        """See `SnapshotStore`; on each host."""
        super().grow(ranks)
        for host in self._engines.hosts:
            self._buffers(host)

    @property
    def elsewhere(self) -> dict[str, list[list[str]]]:
        """See `SnapshotStore`."""
        return {host.name: own for host, own in self._written.items() if not host.lost}

    def paths_on(self, host: Host) -> list[list[str]]:
        """See `SnapshotStore`."""
        with self._copying, contextlib.suppress(ClusterError):
            return self._buffers(host)
        return [[] for _ in self.paths]  # it is lost just now: no rank there will read them

    def _buffers(self, host: Host) -> list[list[str]]:
        """Each rank's buffers on a host, which may have come back since the last call."""
        written = self._written.setdefault(host, [])
        while len(written) < len(self.paths):
            written.append(host.hold(BUFFERS_PER_RANK))
        return written

    @property
    def last_step(self) -> int:
        """See `SnapshotStore`; of the hosts that are left."""
        found = [super().last_step]
        for host in self._engines.hosts:
            with contextlib.suppress(ClusterError):
                heads = self._heads(host, range(len(self.paths)))
                found += [step for own in heads.values() for _, step in own]
        return max(found)

    def refresh(self) -> None:
        """See `SnapshotStore`: copies the newest whole snapshot of the hosts that are left, if it is not here yet."""
        with self._copying, contextlib.suppress(ClusterError):  # a host is lost just now: the last copy stays
            self._copy()

    def distribute(self) -> None:
        """See `SnapshotStore`: on each host that is left, the newest snapshot that is here."""
        with self._copying:
            if (found := self.newest) is None:
                return
            for host in self._engines.hosts:
                with contextlib.suppress(ClusterError):  # it is lost: its ranks are replaced again
                    self._send(host, found[1])

    def trim(self) -> None:
        """See `SnapshotStore`."""
        self.refresh()
        super().trim()
        with self._copying, contextlib.suppress(ClusterError):
            found = self.newest
            moments = set() if found is None else {buffer.head for buffer in found[1].values()}
            for host in self._engines.hosts:
                heads = self._heads(host, range(len(self.paths)))
                old = [
                    path
                    for rank, own in heads.items()
                    for path, (head, _) in zip(self._buffers(host)[rank], own, strict=True)
                    if head not in moments
                ]
                host.empty(old)

    def close(self) -> None:
        """See `SnapshotStore`; on each host."""
        self._closed.set()
        with self._copying:
            super().close()
            for host in self._engines.hosts:
                host.release([path for own in self._written.pop(host, []) for path in own])

    def _follow(self) -> None:
        took_s = 0.0
        while not self._closed.wait(max(_INTERVAL_S, _INTERVAL_FACTOR * took_s)) and not self._engines.ended:
            started_s = time.monotonic()
            self.refresh()
            took_s = time.monotonic() - started_s

    def _heads(self, host: Host, ranks: range | list[int]) -> dict[int, list[tuple[Head, int]]]:
        """Header and last step of the buffers of ranks on a host."""
        places = [(path, 0, Head.nbytes_read()) for rank in ranks for path in self._buffers(host)[rank]]
        read = host.read_memory(places)
        return {
            rank: [Head.parse(data) for data in read[i * BUFFERS_PER_RANK : (i + 1) * BUFFERS_PER_RANK]]
            for i, rank in enumerate(ranks)
        }

    def _copy(self) -> None:
        if self._closed.is_set():
            return
        placed = {
            host: [rank for rank in ranks if rank < len(self.paths)]  # engines are added before `grow`
            for host, ranks in self._engines.by_host().items()
            if host is not None and not host.lost and host in self._written  # else all that was written there is lost
        }
        heads: dict[int, list[Head]] = {}
        for host, ranks in placed.items():
            found = self._heads(host, ranks)
            heads |= {rank: [head for head, _ in own] for rank, own in found.items()}
        whole = newest_whole(heads)
        here = newest_whole({rank: [SnapshotBuffer(path).head for path in own] for rank, own in enumerate(self.paths)})
        if not whole or (here and _moment(whole) <= _moment(here)):
            return
        for host, ranks in placed.items():
            for rank in whole.keys() & {*ranks}:
                number = heads[rank].index(whole[rank])
                self._fetch(host, rank, self._buffers(host)[rank][number], whole[rank])

    def _fetch(self, host: Host, rank: int, path: str, head: Head) -> None:
        """Copy a buffer of a host over the oldest one here, unless its rank has written it meanwhile."""
        (content,) = host.read_memory([(path, HEAD_BYTES, head.nbytes)])
        (after,) = host.read_memory([(path, 0, Head.nbytes_read())])
        if Head.parse(after)[0] == head and len(content) == head.nbytes:
            kept = set() if (found := self.newest) is None else {buffer.path for buffer in found[1].values()}
            free = [buffer for buffer in map(SnapshotBuffer, self.paths[rank]) if buffer.path not in kept]
            min(free, key=lambda buffer: buffer.head[:2]).fill(head, content)

    def _send(self, host: Host, buffers: dict[int, SnapshotBuffer]) -> None:
        """Write the buffers of a snapshot into the oldest ones of a host that has another one."""
        heads = self._heads(host, [*buffers])
        for rank, buffer in buffers.items():
            own = [head for head, _ in heads[rank]]
            if buffer.head in own:
                continue
            path = self._buffers(host)[rank][min(range(len(own)), key=lambda i: own[i][:2])]
            host.write_memory(path, 0, Head.none())
            host.write_memory(path, HEAD_BYTES, buffer.content.numpy().data)
            host.write_memory(path, 0, buffer.head.packed())


def _moment(heads: Mapping[int, Head]) -> tuple[int, int, int]:
    return next(iter(heads.values()))[:3]

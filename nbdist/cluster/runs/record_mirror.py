"""Record mirror: the records that ranks of other hosts write there, copied into this host's folder of records."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Mapping

from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.hosts.host import Host
from nbdist.telemetry.record import record_path, records

__all__ = ["RecordMirror"]

_Key = tuple[str, int]
"""A host's name, and a rank that records there."""
_INTERVAL_S = 1.0
_HOSTS_AN_INTERVAL = 16
_LAST_WITHIN_S = 5.0


class RecordMirror:
    """Copies what the ranks of one run have recorded on other hosts, a second later. Used by one thread.

    Of many hosts, each second it is the next `_HOSTS_AN_INTERVAL` in turn.

    Args:
        engines: Of the run.
        run_id: The run.
    """

    def __init__(self, engines: Engines, run_id: str) -> None:
        self._engines = engines
        self._run_id = run_id
        anchor = engines.anchor
        noted = {} if anchor is None or engines.share_memory else anchor.state()["notes"].get("copied", {})
        self._copied: dict[_Key, int] = noted.get(run_id, {})  # bytes
        self._pending: dict[Host, tuple[list[int], concurrent.futures.Future[list[bytes]]]] = {}
        self._due_s, self._turn = 0.0, 0

    def poll(self) -> None:
        """Copy what has come, and request more, once a second. Does not wait."""
        self._receive()
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _INTERVAL_S
            others = list(self._others().items())
            count = min(len(others), _HOSTS_AN_INTERVAL)
            self._request(dict(others[(self._turn + i) % len(others)] for i in range(count)))
            self._turn += count

    def finish(self) -> None:
        """Copy all that is left, of hosts that answer; waits for them."""
        deadline, behind = time.monotonic() + _LAST_WITHIN_S, self._others()
        self._settle(deadline)  # requested before the ranks ended: it may lack their last lines
        while behind and time.monotonic() < deadline:
            self._request(behind)
            grown = self._settle(deadline)
            behind = {host: ranks for host, ranks in behind.items() if host in grown}

    def _settle(self, deadline_s: float) -> set[Host]:
        """Wait for what is pending; see `_receive`."""
        concurrent.futures.wait([read for _, read in self._pending.values()], max(0.0, deadline_s - time.monotonic()))
        return self._receive()

    def _others(self) -> dict[Host, list[int]]:
        """The hosts of other records than this one's, and their ranks."""
        return {
            host: ranks
            for host, ranks in self._engines.by_host().items()
            if host is not None and not host.lost and host.facts.host_id != self._engines.host_id
        }

    def _request(self, others: Mapping[Host, list[int]]) -> None:
        for host, ranks in others.items():
            if host not in self._pending:
                starts = [(rank, self._copied.get((host.name, rank), 0)) for rank in ranks]
                self._pending[host] = ranks, host.read_records(self._run_id, starts)

    def _receive(self) -> set[Host]:
        """Append what has come; returns the hosts on which something has grown."""
        grown = set[Host]()
        for host, (ranks, read) in list(self._pending.items()):
            if not read.done():
                continue
            del self._pending[host]
            if read.exception() is not None:
                continue
            for rank, part in zip(ranks, read.result(), strict=True):
                if not part:
                    continue
                path = record_path(self._run_id, rank, records())
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with path.open("ab") as file:
                    file.write(part)
                self._copied[host.name, rank] = self._copied.get((host.name, rank), 0) + len(part)
                grown.add(host)
        if grown and self._engines.anchor is not None:
            self._engines.anchor.note("copied", {self._run_id: self._copied})
        return grown

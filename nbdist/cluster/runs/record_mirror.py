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
_LAST_WITHIN_S = 5.0


class RecordMirror:
    """Copies what the ranks of one run have recorded on other hosts, a second later. Used by one thread.

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
        self._pending: dict[_Key, concurrent.futures.Future[bytes]] = {}
        self._due_s = 0.0

    def poll(self) -> None:
        """Copy what has come, and request more, once a second. Does not wait."""
        self._receive()
        if time.monotonic() >= self._due_s:
            self._due_s = time.monotonic() + _INTERVAL_S
            self._request(self._others())

    def finish(self) -> None:
        """Copy all that is left, of hosts that answer; waits for them."""
        deadline, behind = time.monotonic() + _LAST_WITHIN_S, self._others()
        while behind and time.monotonic() < deadline:
            self._request(behind)
            concurrent.futures.wait(self._pending.values(), max(0.0, deadline - time.monotonic()))
            grown = self._receive()
            behind = {key: host for key, host in behind.items() if key in grown}

    def _others(self) -> dict[_Key, Host]:
        """The records of ranks that are not on this host, and where they are."""
        placed = [(record, self._engines.host_of(record)) for record in self._engines.records()]
        return {
            (host.name, record.rank): host
            for record, host in placed
            if host is not None and record.host_id != self._engines.host_id
        }  # fmt: skip

    def _request(self, others: Mapping[_Key, Host]) -> None:
        for key, host in others.items():
            if key not in self._pending and not host.lost:
                self._pending[key] = host.read_record(self._run_id, key[1], self._copied.get(key, 0))

    def _receive(self) -> set[_Key]:
        """Append what has come; returns the records that have grown."""
        grown = set[_Key]()
        for key, future in list(self._pending.items()):
            if not future.done():
                continue
            del self._pending[key]
            if future.exception() is None and (part := future.result()):
                path = record_path(self._run_id, key[1], records())
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                with path.open("ab") as file:
                    file.write(part)
                self._copied[key] = self._copied.get(key, 0) + len(part)
                grown.add(key)
        if grown and self._engines.anchor is not None:
            self._engines.anchor.note("copied", {self._run_id: self._copied})
        return grown

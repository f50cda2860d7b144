"""Payloads on the hosts of engines: sent to another host once, for all its engines, and fetched from there once."""

from __future__ import annotations

import concurrent.futures
import contextlib
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from nbdist.cluster.hosts.host import Host, HostLostError
from nbdist.core.transfer.payload import Payload, Segment, is_released, unpack
from nbdist.errors import ClusterError
from nbdist.segment_path import open_segment

__all__ = ["HostPayloads"]


class HostPayloads:
    """Sends and fetches payloads; on the kernel's own host they stay where they are. Thread-safe.

    Args:
        host_of: The host of a rank; None for one that is known to be the kernel's.
    """

    def __init__(self, host_of: Callable[[int], Host | None]) -> None:
        self._host_of = host_of
        self._copies: dict[str, dict[Host, str]] = {}  # their paths there, by the path here
        self._lock = threading.Lock()
        self._result_path = ""  # of the payload that held the last result

    def place(self, payload: Payload, ranks: Iterable[int]) -> dict[int, Payload]:
        """The payload as each rank maps it; hosts that have none yet get a copy, all at once.

        Where a host is lost meanwhile, the payload stays as it is: no rank there will read it.
        """
        hosts = {rank: self._host_of(rank) for rank in ranks}
        far = {host for host in hosts.values() if host is not None and not host.here}
        if not far:
            return dict.fromkeys(hosts, payload)
        with self._lock:
            copies = self._copies.setdefault(payload.path, {})
            if missing := far - set(copies):
                with concurrent.futures.ThreadPoolExecutor(len(missing)) as threads:
                    paths = threads.map(lambda host: _send(payload, host), missing)
                    copies |= {host: path for host, path in zip(missing, paths, strict=True) if path}
            placed = {host: replace(payload, path=path) for host, path in copies.items()}
        return {rank: payload if host is None else placed.get(host, payload) for rank, host in hosts.items()}

    def release(self, payload: Payload) -> None:
        """Free the copies of a payload. Ranks that have mapped one keep it."""
        with self._lock:
            copies = self._copies.pop(payload.path, {})
        for host, path in copies.items():
            host.release([path])

    def open(self, payload: Payload, rank: int) -> Any:
        """Unpack a payload of a rank; what is in it outlives that rank.

        Raises:
            ClusterError: The rank has ended, and its memory with it.
        """
        host = self._host_of(rank)
        if host is None or host.here:
            return unpack(payload)
        with contextlib.closing(Segment(payload.nbytes)) as segment:
            start = 0
            for part in host.stream_memory(payload.path, payload.nbytes):
                segment.fill([(start, memoryview(part))])
                start += len(part)
            if start < payload.nbytes:
                raise ClusterError(f"host {host.name}: a payload of {payload.nbytes} bytes ended after {start}.")
            return unpack(replace(payload, path=segment.path))

    def open_result(self, payload: Payload, rank: int) -> Any:
        """`open` the result of a run, whose memory the rank may reuse once nothing here maps it."""
        self._result_path = payload.path
        return self.open(payload, rank)

    @property
    def result_is_released(self) -> bool:
        """Whether a rank may reuse the memory of its last result."""
        return is_released(self._result_path)


def _send(payload: Payload, host: Host) -> str:
    """Copy a payload to a host; returns its path there, empty if the host is lost."""
    path = ""
    with contextlib.suppress(HostLostError), os.fdopen(open_segment(payload.path), "rb") as file:
        (path,) = host.hold(1)
        with mmap.mmap(file.fileno(), payload.nbytes, access=mmap.ACCESS_READ) as memory, memoryview(memory) as view:
            host.write_memory(path, 0, view)
    return path

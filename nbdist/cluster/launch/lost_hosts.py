"""Lost hosts: they are tried again until they are back, so that engines can be started there."""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable

from nbdist.cluster.hosts.remote_host import RemoteHost
from nbdist.errors import ClusterError

__all__ = ["LostHosts"]

_WAITS_S = (1.0, 2.0, 4.0, 8.0)
_LONGEST_WAIT_S = 15.0


class LostHosts:
    """Tries them, each in a thread.

    Args:
        begin: Starts the agent of the host with a name.
        back: Called with a host that has answered, in its thread.
    """

    def __init__(self, begin: Callable[[str], RemoteHost], back: Callable[[RemoteHost], None]) -> None:
        self._begin, self._back = begin, back
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._sought = set[str]()
        self._tried: dict[str, RemoteHost] = {}
        self._threads: list[threading.Thread] = []

    def seek(self, name: str) -> None:
        """Try a host until it is back. Returns at once; twice is fine."""
        with self._lock:
            if self._closed.is_set() or name in self._sought:
                return
            self._sought.add(name)
            thread = threading.Thread(target=self._seek, args=(name,), daemon=True, name=f"nbdist-seeks-{name}")
            self._threads = [other for other in self._threads if other.is_alive()] + [thread]
            thread.start()

    def close(self) -> None:
        """Give all of them up; one that is back just now has been handed on. Twice is fine."""
        with self._lock:
            self._closed.set()
            tried = list(self._tried.values())
        for host in tried:
            host.end_agent()
        for thread in self._threads:
            thread.join()

    def _seek(self, name: str) -> None:
        for wait_s in itertools.chain(_WAITS_S, itertools.repeat(_LONGEST_WAIT_S)):
            if self._closed.wait(wait_s):
                return
            host = self._begin(name)  # without the lock: whoever tells that another host is lost may wait for it
            with self._lock:
                self._tried[name] = host
                closed = self._closed.is_set()
            if not closed:
                with contextlib.suppress(ClusterError):  # not yet
                    host.facts  # noqa: B018  (waits for the answer)
            with self._lock:
                del self._tried[name]
                closed = self._closed.is_set()
                back = not closed and host.answered and not host.lost
                if back:
                    self._sought.discard(name)
            if back:
                self._back(host)
            else:
                host.end()
            if back or closed:
                return

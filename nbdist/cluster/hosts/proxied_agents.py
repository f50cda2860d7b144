"""The agents of a detached cluster, as its kernel reaches them: through the proxy in the anchor's process."""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import socket
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from nbdist.cluster.hosts.host import HostLostError
from nbdist.errors import ClusterError
from nbdist.peer_auth import same_user

__all__ = ["ProxiedAgents"]

_GONE = "the anchor of this cluster has ended, and the cluster with it."


class ProxiedAgents:
    """As `Agents`. Thread-safe; local to the process that made it.

    Args:
        path: Of the proxy's socket.
    """

    def __init__(self, path: str) -> None:
        peer = socket.socket(socket.AF_UNIX)
        peer.connect(path)
        if not same_user(peer):
            peer.close()
            raise PermissionError(path)
        self._proxy = Connection(peer.detach())
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()
        self._pending: dict[int, concurrent.futures.Future[Any]] = {}
        self._hellos: dict[str, concurrent.futures.Future[dict[str, Any]]] = {}
        self._followers: dict[str, tuple[Callable[[Sequence[Any]], None], Callable[[], None]]] = {}
        self._lost = set[str]()
        self._ended = False
        threading.Thread(target=self._receive, daemon=True, name="nbdist-agents").start()

    def start(self, name: str, command: Sequence[str]) -> str:
        """See `Agents`."""
        return str(self._send("start", name, list(command)).result())

    def follow(self, identity: str, on_event: Callable[[Sequence[Any]], None], on_lost: Callable[[], None]) -> None:
        """See `Agents`."""
        self._followers[identity] = on_event, on_lost

    def hello(self, identity: str) -> concurrent.futures.Future[dict[str, Any]]:
        """See `Agents`."""
        with self._lock:
            return self._hellos.setdefault(identity, concurrent.futures.Future())

    def lost(self, identity: str) -> bool:
        """See `Agents`."""
        return self._ended or identity in self._lost

    def request(
        self, identity: str, kind: str, *arguments: Any, frames: Sequence[bytes] = ()
    ) -> concurrent.futures.Future[tuple[Any, list[bytes]]]:
        """See `Agents`."""
        return self._send("request", identity, kind, arguments, list(frames))

    def hang_up(self, identity: str) -> None:
        """See `Agents`."""
        self._send("hang_up", identity)

    def end(self, identity: str) -> None:
        """See `Agents`."""
        with contextlib.suppress(ClusterError):
            self._send("end", identity).result()

    def close(self) -> None:
        """Leave the agents to the next kernel. Twice is fine."""
        self._proxy.close()

    def _send(self, method: str, *arguments: Any) -> concurrent.futures.Future[Any]:
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._lock:
            number = next(self._numbers)
            try:
                if self._ended:
                    raise OSError
                if method != "hang_up":  # which has no reply
                    self._pending[number] = future
                self._proxy.send((number, method, arguments))
            except OSError:
                self._pending.pop(number, None)
                future.set_exception(HostLostError(_GONE))
        return future

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError, TypeError):  # TypeError: closed meanwhile
            while True:
                kind, *content = self._proxy.recv()
                getattr(self, f"_on_{kind}")(*content)
        with self._lock:
            self._ended = True
            pending = [*self._pending.values(), *self._hellos.values()]
        for future in pending:
            if not future.done():
                future.set_exception(HostLostError(_GONE))
        for _, on_lost in list(self._followers.values()):
            on_lost()

    def _on_replied(self, number: int, result: Any, error: BaseException | None) -> None:
        with self._lock:
            future = self._pending.pop(number)
        _settle(future, result, error)

    def _on_hello(self, identity: str, facts: dict[str, Any], error: BaseException | None) -> None:
        _settle(self.hello(identity), facts, error)

    def _on_lost(self, identity: str) -> None:
        self._lost.add(identity)
        if (follower := self._followers.get(identity)) is not None:
            follower[1]()

    def _on_event(self, identity: str, event: Sequence[Any]) -> None:
        if (follower := self._followers.get(identity)) is not None:
            follower[0](event)


def _settle(future: concurrent.futures.Future[Any], result: Any, error: BaseException | None) -> None:
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)

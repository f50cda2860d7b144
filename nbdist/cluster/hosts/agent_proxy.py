"""Proxy: the agents of a detached cluster, in the process of its anchor, for one kernel after another.

Messages are pickled tuples over a Unix socket, on which a peer of another user is refused. A kernel sends ``(number,
method, arguments)``, with a method of `Agents`, and gets ``("replied", number, result, error)``, as each has ended. It
is told of all agents, of those of an earlier kernel too: ``("hello", identity, facts, error)``, ``("lost", identity)``
and ``("event", identity, event)``.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from nbdist.cluster.hosts.agents import Agents
from nbdist.peer_auth import same_user

__all__ = ["AgentProxy"]


class AgentProxy:
    """Serves kernels in threads, as long as it lives.

    Args:
        address: See `Agents`.
        path: Of the socket that kernels connect to.
    """

    def __init__(self, address: str, path: str) -> None:
        self._agents = Agents(address)
        self._identities: list[str] = []
        self._lock = threading.Lock()
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True, name="nbdist-proxy").start()

    def close(self) -> None:
        """End all agents."""
        self._listener.close()
        for identity in self._identities:
            self._agents.hang_up(identity)
        for identity in self._identities:
            self._agents.end(identity)
        self._agents.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                peer, _ = self._listener.accept()
                if same_user(peer):
                    threading.Thread(target=self._serve, args=(Connection(peer.detach()),), daemon=True).start()
                else:
                    peer.close()

    def _serve(self, kernel: Connection) -> None:
        unsent: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=_send, args=(kernel, unsent), daemon=True).start()
        with self._lock:
            for identity in self._identities:
                self._tell_of(identity, unsent.put)
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._answer(unsent.put, *kernel.recv())
        unsent.put(None)

    def _answer(self, put: Callable[[Any], None], number: int, method: str, arguments: Any) -> None:
        if method == "start":
            with self._lock:
                identity = self._agents.start(*arguments)
                self._identities.append(identity)
                put(("replied", number, identity, None))
                self._tell_of(identity, put)
        elif method == "request":
            identity, kind, values, frames = arguments
            future = self._agents.request(identity, kind, *values, frames=frames)
            future.add_done_callback(lambda done: put(("replied", number, *_outcome(done))))
        elif method == "hang_up":
            self._agents.hang_up(*arguments)
        else:
            threading.Thread(target=self._end, args=(*arguments, number, put), daemon=True).start()

    def _end(self, identity: str, number: int, put: Callable[[Any], None]) -> None:
        self._agents.end(identity)
        put(("replied", number, None, None))

    def _tell_of(self, identity: str, put: Callable[[Any], None]) -> None:
        """Tell a kernel, and from now on no other, of an agent."""
        self._agents.follow(identity, lambda event: put(("event", identity, event)), lambda: put(("lost", identity)))
        self._agents.hello(identity).add_done_callback(lambda done: put(("hello", identity, *_outcome(done))))
        if self._agents.lost(identity):
            put(("lost", identity))


def _outcome(done: Any) -> tuple[Any, BaseException | None]:
    error = done.exception()
    return (None, error) if error is not None else (done.result(), None)


def _send(kernel: Connection, unsent: queue.SimpleQueue[Any]) -> None:
    """Send what is put into a queue, until None is; so that a kernel that is stopped delays no agent."""
    with contextlib.suppress(OSError):
        while (message := unsent.get()) is not None:
            kernel.send(message)
    kernel.close()

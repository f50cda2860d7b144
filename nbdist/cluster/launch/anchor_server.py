"""Anchor: the process of a detached cluster that holds what must outlive a kernel.

It hosts the ranks' store, and holds the shared memory of snapshots, boards and payloads, and notes for the next kernel.
It is the owner of controller, engines and the agents of other hosts, which else is the kernel; see `parent_watch`.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import shutil
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

import psutil

from nbdist.peer_auth import same_user
from nbdist.process_mark import alive

__all__ = ["main"]

_POLL_S = 0.5


class _Server:
    """Serves kernels, one request at a time; all are short.

    Args:
        listener: The socket that they connect to.
        patience_s: How long it lives, in seconds, without a kernel that owns the cluster.
        address: Of this host, where the cluster's other hosts reach it; empty if there are none.
        proxy: The path of the socket at which their agents are reached.
    """

    def __init__(self, listener: socket.socket, patience_s: float, address: str, proxy: str) -> None:
        from nbdist.core.comm.world import host_store
        from nbdist.segment_path import segment_path

        self._path = segment_path
        self._listener = listener
        self._patience_s = patience_s
        self._proxy: Any = None
        if address:
            from nbdist.cluster.hosts.agent_proxy import AgentProxy

            self._proxy = AgentProxy(address, proxy)
        self._store = host_store(address)
        self._held: dict[str, int] = {}  # the open file of each shared memory, by its path
        self._notes: dict[str, bytes] = {}
        self._connections: dict[int, Connection] = {}
        self._owner: tuple[int, str] | None = None  # its connection and its process mark
        self._alone_since_s = time.monotonic()
        self._ended = False

    def serve(self) -> None:
        """Serve until the cluster is to end."""
        while not self._ended and (self._owner or self._left_s > 0):
            ready, _, _ = select.select([self._listener.fileno(), *self._connections], [], [], _POLL_S)
            for file in ready:
                if file == self._listener.fileno():
                    peer, _ = self._listener.accept()
                    if not same_user(peer):
                        peer.close()
                        continue
                    connection = Connection(peer.detach())
                    self._connections[connection.fileno()] = connection
                else:
                    self._answer(file)
            # Checked here too: a forked child of the kernel may hold its connection open.
            if self._owner is not None and not alive(self._owner[1]):
                self._disown()

    def end(self) -> None:
        """Kill the remaining processes of the cluster: one that hangs cannot end itself."""
        if self._proxy is not None:
            self._proxy.close()
        for mark in pickle.loads(self._notes["processes"]) if "processes" in self._notes else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                if alive(mark):
                    process = psutil.Process(int(mark.partition(":")[0]))
                    for victim in [*process.children(recursive=True), process]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            victim.kill()

    @property
    def _left_s(self) -> float:
        return self._patience_s - (time.monotonic() - self._alone_since_s)

    def _disown(self) -> None:
        self._owner, self._alone_since_s = None, time.monotonic()

    def _answer(self, file: int) -> None:
        connection = self._connections[file]
        try:
            number, name, *values = connection.recv()
            connection.send((number, getattr(self, f"_{name}")(file, *values)))
        except (EOFError, OSError):
            del self._connections[file]
            connection.close()
            if self._owner is not None and self._owner[0] == file:
                self._disown()

    def _own(self, file: int, mark: str) -> str:
        if self._owner is None:
            self._owner = file, mark
        return self._owner[1]

    def _state(self, file: int) -> dict[str, Any]:
        owner = "" if self._owner is None else self._owner[1]
        return {"owner": owner, "left_s": self._left_s, "store": self._store.address, "notes": self._notes}

    def _note(self, file: int, name: str, value: bytes) -> None:
        self._notes[name] = value

    def _hold(self, file: int) -> str:
        held = os.memfd_create("nbdist", os.MFD_CLOEXEC)
        path = self._path(held, f"/proc/{os.getpid()}/fd/{held}")
        self._held[path] = held
        return path

    def _release(self, file: int, path: str) -> None:
        held = self._held.pop(path, None)
        if held is not None:
            os.close(held)

    def _end(self, file: int) -> None:
        self._ended = True


def main() -> None:
    """Entry point of the process that `Anchor.start` starts.

    Arguments: listening socket, folder, entry, patience, address and proxy, see `_Server`.
    """
    listener, folder, entry, patience_s = socket.socket(fileno=int(sys.argv[1])), *sys.argv[2:4], float(sys.argv[4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = _Server(listener, patience_s, *sys.argv[5:7])
    try:
        server.serve()
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(entry)
        server.end()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

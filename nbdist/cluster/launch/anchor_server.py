"""What an anchor runs: it holds for a cluster what has to outlive a kernel, and ends with it.

It holds the store in which ranks meet, the memory of snapshots, boards and payloads, and what another kernel has to
know. Controller and engines are tied to it, as they else are to a kernel; see `owner_guard`.
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

from nbdist.engine.parent_watch import alive
from nbdist.peer_auth import same_user

__all__ = ["main"]

_POLL_S = 0.5


class _Server:
    """Answers kernels; nothing that they ask takes time.

    Args:
        listener: Where they come to.
        patience_s: How long it lives without a kernel that owns the cluster.
    """

    def __init__(self, listener: socket.socket, patience_s: float) -> None:
        from nbdist.core.comm.world import host_store
        from nbdist.core.transfer.payload import segment_path

        self._path = segment_path
        self._listener = listener
        self._patience_s = patience_s
        self._store = host_store()
        self._held: dict[str, int] = {}  # a descriptor of each piece of memory, by its path
        self._notes: dict[str, bytes] = {}
        self._connections: dict[int, Connection] = {}
        self._owner: tuple[int, str] | None = None  # its connection, and the process
        self._alone_since_s = time.monotonic()
        self._over = False

    def serve(self) -> None:
        """Answer until the cluster is to end."""
        while not self._over and (self._owner or self._left_s > 0):
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
            # A child that the kernel has forked may hold its connection open.
            if self._owner is not None and not alive(self._owner[1]):
                self._disown()

    def end(self) -> None:
        """End what is left of the cluster's processes: one that hangs cannot end itself."""
        for mark in pickle.loads(self._notes["processes"]) if "processes" in self._notes else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                if alive(mark):
                    process = psutil.Process(int(mark.partition(":")[0]))
                    for each in [*process.children(recursive=True), process]:
                        with contextlib.suppress(psutil.NoSuchProcess):
                            each.kill()

    @property
    def _left_s(self) -> float:
        return self._patience_s - (time.monotonic() - self._alone_since_s)

    def _disown(self) -> None:
        self._owner, self._alone_since_s = None, time.monotonic()

    def _answer(self, file: int) -> None:
        connection = self._connections[file]
        try:
            number, word, *values = connection.recv()
            connection.send((number, getattr(self, f"_{word}")(file, *values)))
        except (EOFError, OSError):
            del self._connections[file]
            connection.close()
            if self._owner is not None and self._owner[0] == file:
                self._disown()

    def _own(self, file: int, mark: str) -> str:
        if self._owner is None:
            self._owner = file, mark
        return self._owner[1]

    def _look(self, file: int) -> dict[str, Any]:
        owner = "" if self._owner is None else self._owner[1]
        return {"owner": owner, "left_s": self._left_s, "store": self._store.address, "notes": self._notes}

    def _note(self, file: int, name: str, value: bytes) -> None:
        self._notes[name] = value

    def _hold(self, file: int) -> str:
        held = os.memfd_create("nbdist", os.MFD_CLOEXEC)
        path = self._path(held, f"/proc/{os.getpid()}/fd/{held}")
        self._held[path] = held
        return path

    def _let_go(self, file: int, path: str) -> None:
        held = self._held.pop(path, None)
        if held is not None:
            os.close(held)

    def _end(self, file: int) -> None:
        self._over = True


def main() -> None:
    """Serve, as the process that `Anchor.start` starts: a listening socket, a folder, an entry, and its patience."""
    listener, folder, entry, patience_s = socket.socket(fileno=int(sys.argv[1])), *sys.argv[2:4], float(sys.argv[4])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    server = _Server(listener, patience_s)
    try:
        server.serve()
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(entry)
        server.end()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

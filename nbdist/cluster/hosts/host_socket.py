"""A Unix socket in the folder of a cluster on one host, to which one process of that host connects."""

from __future__ import annotations

import contextlib
import os
import select
import socket
from pathlib import Path

from nbdist.errors import ClusterError
from nbdist.peer_auth import same_user

__all__ = ["HostSocket"]


class HostSocket:
    """Listens at `path`. Used by one thread at a time.

    Args:
        folder: Of the cluster, mode 0700.
    """

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / f"socket-{os.urandom(4).hex()}")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.path)
        self._listener.listen()
        self._connection: socket.socket | None = None

    def receive(self, within_s: float) -> bytes | None:
        """What the process has sent; None if nothing has come in time, empty once it has closed the connection.

        Raises:
            ClusterError: Another user's process has connected.
        """
        waiting = self._connection or self._listener
        if not select.select([waiting], [], [], within_s)[0]:
            return None
        if self._connection is not None:
            return self._connection.recv(1 << 16)
        self._connection, _ = self._listener.accept()
        if not same_user(self._connection):
            raise ClusterError("another user's process connected instead of an engine: start it again.")
        return None

    def send(self, data: bytes) -> None:
        """Send to the process that has connected."""
        assert self._connection is not None
        self._connection.sendall(data)

    def close(self) -> None:
        """Close it, and remove its name. Twice is fine."""
        for each in (self._connection, self._listener):
            if each is not None:
                each.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)

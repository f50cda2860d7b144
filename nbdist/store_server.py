"""The store's server: the program of the process that holds a cluster's key-value store.

A process of its own, so that it answers while the notebook computes. Standard library only: it starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import sys
import threading

from nbdist.keepalive import keep_alive
from nbdist.peer_auth import authenticate_client, pack, receive_fields, same_user

__all__ = ["main"]

_OWNER_POLL_S = 0.5
_RETRY_S = 0.05
_AUTHENTICATION_TIMEOUT_S = 30.0
_MAX_UNAUTHENTICATED = 256
"""Over TCP every user can open connections, so those that are not authenticated are limited: the oldest is closed."""


class _Store:
    """Keys and values, served to authenticated clients only."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._values: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self._unauthenticated: dict[socket.socket, None] = {}

    def serve(self, peer: socket.socket) -> None:
        """Serve a client in a new thread."""
        with self._lock:
            self._unauthenticated[peer] = None
            oldest = next(iter(self._unauthenticated)) if len(self._unauthenticated) > _MAX_UNAUTHENTICATED else None
            if oldest is not None:
                del self._unauthenticated[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
        threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """Answer one client's requests until it disconnects."""
        with peer, contextlib.suppress(OSError, struct.error, ValueError):
            keep_alive(peer)
            try:
                peer.settimeout(_AUTHENTICATION_TIMEOUT_S)
                authenticate_client(peer, self._secret, "store")
                peer.settimeout(None)
            finally:
                with self._lock:
                    self._unauthenticated.pop(peer, None)
            while True:
                command, *fields = receive_fields(peer)
                with self._lock:
                    reply = self._reply(command, fields)
                peer.sendall(pack(reply))

    def _reply(self, command: bytes, fields: list[bytes]) -> list[bytes]:
        values = self._values
        if command == b"set":
            values[fields[0]] = fields[1]
            return []
        if command == b"get":  # all values; or none, and the client asks again later
            return [values[key] for key in fields] if all(key in values for key in fields) else []
        if command == b"check":
            return [b"1"] if all(key in values for key in fields) else []
        if command == b"add":
            values[fields[0]] = str(int(values.get(fields[0], b"0")) + int(fields[1])).encode()
            return [values[fields[0]]]
        if command == b"append":
            values[fields[0]] = values.get(fields[0], b"") + fields[1]
            return []
        if command == b"delete":
            return [b"1"] if values.pop(fields[0], None) is not None else []
        raise ValueError(command)


def main() -> None:
    """Serve a store until the parent process (the owner) ends or closes its connection.

    Command-line arguments: descriptors of a listening socket and of the owner's connection. The secret comes over the
    connection, because every user can read the arguments of a process.
    """
    listener, owner = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    parent = os.getppid()
    (secret,) = receive_fields(owner)
    store = _Store(secret)
    while os.getppid() == parent:  # the parent is polled, because a fork of it may keep its connection open
        ready, _, _ = select.select([listener, owner], [], [], _OWNER_POLL_S)
        if owner in ready:
            return
        if listener in ready:
            try:
                peer, _ = listener.accept()
            except OSError:  # the client has disconnected already; or no descriptor is free until another one does
                select.select([owner], [], [], _RETRY_S)
                continue
            if same_user(peer):
                store.serve(peer)
            else:
                peer.close()

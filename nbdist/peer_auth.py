"""Authentication between the processes of a world (same user, shared secret), and the key-value store that requires it.

Standard library only: this file is also the program of the store's server, a separate process, which starts in
milliseconds and answers while the notebook computes.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence

__all__ = [
    "COMMAND",
    "IntruderError",
    "authenticate_as_client",
    "authenticate_client",
    "pack",
    "receive_exactly",
    "receive_fields",
    "same_user",
]

COMMAND = __file__
"""The program that serves a store."""
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"!I{_NONCE_BYTES}s")  # the client's rank and nonce
_LENGTH = struct.Struct("!I")
_OWNER_POLL_S = 0.5
_RETRY_S = 0.05
_AUTHENTICATION_TIMEOUT_S = 30.0
_MAX_UNAUTHENTICATED = 256
"""Over TCP every user can open connections, so those that are not authenticated are limited: the oldest is closed."""


class IntruderError(OSError):
    """The process at the other end belongs to another user, or does not know the world's secret."""


def same_user(peer: socket.socket) -> bool:
    """Whether this user runs the process at the other end; true if the socket cannot tell (TCP, or not Linux)."""
    if peer.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user) == os.geteuid()  # SO_PEERCRED reports the effective user id


def receive_exactly(peer: socket.socket, length: int, check: Callable[[], object] | None = None) -> bytes:
    """Receive `length` bytes; `check` is called every 20 ms meanwhile, and may end the wait by raising.

    Raises:
        ConnectionError: The peer closes the connection first.
    """
    data = b""
    while len(data) < length:
        while check is not None and not select.select([peer], [], [], 0.02)[0]:
            check()
        part = peer.recv(length - len(data))
        if not part:
            raise ConnectionError("another rank is gone while ranks connect.")
        data += part
    return data


def authenticate_as_client(
    peer: socket.socket, secret: bytes, purpose: str, rank: int = 0, check: Callable[[], object] | None = None
) -> None:
    """Challenge and response, the connecting side: both sides prove that they know `secret`, without sending it.

    Args:
        peer: The connection.
        secret: The world's secret.
        purpose: What the connection is for; a proof is valid for this purpose only.
        rank: This rank, which the listener learns.
        check: See `receive_exactly`.

    Raises:
        IntruderError: The listener belongs to another user, or does not know the secret.
    """
    if not same_user(peer):
        raise IntruderError("another user's process listens at the address of a rank or of the store")
    client = secrets.token_bytes(_NONCE_BYTES)
    peer.sendall(_HELLO.pack(rank, client))
    listener = receive_exactly(peer, _NONCE_BYTES, check)
    proof = receive_exactly(peer, _PROOF_BYTES, check)
    if not hmac.compare_digest(proof, _proof(secret, b"accept", purpose, rank, client, listener)):
        raise IntruderError("a process without the world's secret listens at the address of a rank or of the store")
    peer.sendall(_proof(secret, b"call", purpose, rank, client, listener))


def authenticate_client(
    peer: socket.socket, secret: bytes, purpose: str, check: Callable[[], object] | None = None
) -> int:
    """The listening side of `authenticate_as_client`; returns the client's rank."""
    if not same_user(peer):
        raise IntruderError("another user's process has connected")
    rank, client = _HELLO.unpack(receive_exactly(peer, _HELLO.size, check))
    listener = secrets.token_bytes(_NONCE_BYTES)
    peer.sendall(listener + _proof(secret, b"accept", purpose, rank, client, listener))
    proof = receive_exactly(peer, _PROOF_BYTES, check)
    if not hmac.compare_digest(proof, _proof(secret, b"call", purpose, rank, client, listener)):
        raise IntruderError("a process without the world's secret has connected")
    return int(rank)


def _proof(secret: bytes, role: bytes, purpose: str, rank: int, client: bytes, listener: bytes) -> bytes:
    """An HMAC; with the role in it a proof cannot be sent back, with the nonces it cannot be replayed."""
    return hmac.digest(secret, b"\0".join([role, purpose.encode(), str(rank).encode(), client + listener]), "sha256")


def pack(fields: Sequence[bytes]) -> bytes:
    """Encode fields as one message."""
    body = b"".join(_LENGTH.pack(len(field)) + field for field in fields)
    return _LENGTH.pack(len(body)) + body


def receive_fields(peer: socket.socket) -> list[bytes]:
    """Receive and decode the next message."""
    (length,) = _LENGTH.unpack(receive_exactly(peer, _LENGTH.size))
    body, start, fields = receive_exactly(peer, length), 0, []
    while start < length:
        (size,) = _LENGTH.unpack_from(body, start)
        start += _LENGTH.size + size
        fields.append(body[start - size : start])
    return fields


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


if __name__ == "__main__":
    main()

"""Authentication between the processes of a world: same user, shared secret; and the messages of its store.

Standard library only: the store's server, a separate process, uses it too, and starts in milliseconds.
"""

from __future__ import annotations

import hmac
import os
import secrets
import select
import socket
import struct
from collections.abc import Callable, Sequence

__all__ = [
    "IntruderError",
    "authenticate_as_client",
    "authenticate_client",
    "pack",
    "receive_exactly",
    "receive_fields",
    "same_user",
]

_NONCE_BYTES = 16
_PROOF_BYTES = 32
_HELLO = struct.Struct(f"!I{_NONCE_BYTES}s")  # the client's rank and nonce
_LENGTH = struct.Struct("!I")


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

"""Who may take part in a world: the same user, who knows the world's secret; and the store that asks for both.

Standard library only: the store runs this file as a process of its own, which starts in milliseconds and answers while
the notebook computes.
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
    "accept_proof",
    "give_proof",
    "pack",
    "receive_exactly",
    "receive_fields",
    "same_user",
]

COMMAND = __file__
"""What Python runs to serve a store."""
_NONCE_BYTES = 16
_PROOF_BYTES = 32
_CALL = struct.Struct(f"!I{_NONCE_BYTES}s")  # the rank that calls, and its nonce
_LENGTH = struct.Struct("!I")
_OWNER_LOOK_S = 0.5
_NAP_S = 0.05
_PROVE_WITHIN_S = 30.0
_MOST_UNPROVED = 256
"""Connections that have not proved themselves; over TCP every user can make some. The oldest makes way for more."""


class IntruderError(OSError):
    """The process at the other end belongs to another user, or does not know the world's secret."""


def same_user(peer: socket.socket) -> bool:
    """Whether this user runs the process at the other end; true where a socket does not tell (TCP, or not Linux)."""
    if peer.family != socket.AF_UNIX or not hasattr(socket, "SO_PEERCRED"):
        return True
    _, user, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return int(user) == os.geteuid()  # the effective one is what the system tells


def receive_exactly(peer: socket.socket, length: int, look: Callable[[], object] | None = None) -> bytes:
    """Receive so many bytes; `look` is called now and then meanwhile, and may end the wait with an error.

    Raises:
        ConnectionError: The peer hangs up before.
    """
    data = b""
    while len(data) < length:
        while look is not None and not select.select([peer], [], [], 0.02)[0]:
            look()
        part = peer.recv(length - len(data))
        if not part:
            raise ConnectionError("another rank is gone while the ranks meet.")
        data += part
    return data


def give_proof(
    peer: socket.socket, secret: bytes, about: str, rank: int = 0, look: Callable[[], object] | None = None
) -> None:
    """Prove to who listens that this process knows `secret`, and let it prove the same. The side that connects.

    Args:
        peer: The connection.
        secret: The world's.
        about: What the connection is for; a proof holds for nothing else.
        rank: The one that calls.
        look: See `receive_exactly`.

    Raises:
        IntruderError: It could not.
    """
    if not same_user(peer):
        raise IntruderError("another user's process listens at the address of a rank or of the store")
    mine = secrets.token_bytes(_NONCE_BYTES)
    peer.sendall(_CALL.pack(rank, mine))
    theirs = receive_exactly(peer, _NONCE_BYTES, look)
    told = receive_exactly(peer, _PROOF_BYTES, look)
    if not hmac.compare_digest(told, _proof(secret, b"accept", about, rank, mine, theirs)):
        raise IntruderError("a process without the world's secret listens at the address of a rank or of the store")
    peer.sendall(_proof(secret, b"call", about, rank, mine, theirs))


def accept_proof(peer: socket.socket, secret: bytes, about: str, look: Callable[[], object] | None = None) -> int:
    """The side that listens, see `give_proof`; returns the rank that called."""
    if not same_user(peer):
        raise IntruderError("another user's process has called")
    rank, theirs = _CALL.unpack(receive_exactly(peer, _CALL.size, look))
    mine = secrets.token_bytes(_NONCE_BYTES)
    peer.sendall(mine + _proof(secret, b"accept", about, rank, theirs, mine))
    told = receive_exactly(peer, _PROOF_BYTES, look)
    if not hmac.compare_digest(told, _proof(secret, b"call", about, rank, theirs, mine)):
        raise IntruderError("a process without the world's secret has called")
    return int(rank)


def _proof(secret: bytes, role: bytes, about: str, rank: int, caller: bytes, listener: bytes) -> bytes:
    return hmac.digest(secret, b"\0".join([role, about.encode(), str(rank).encode(), caller + listener]), "sha256")


def pack(fields: Sequence[bytes]) -> bytes:
    """Fields as one message."""
    body = b"".join(_LENGTH.pack(len(field)) + field for field in fields)
    return _LENGTH.pack(len(body)) + body


def receive_fields(peer: socket.socket) -> list[bytes]:
    """The fields of the next message."""
    (length,) = _LENGTH.unpack(receive_exactly(peer, _LENGTH.size))
    body, start, fields = receive_exactly(peer, length), 0, []
    while start < length:
        (size,) = _LENGTH.unpack_from(body, start)
        start += _LENGTH.size + size
        fields.append(body[start - size : start])
    return fields


class _Store:
    """Keys and values, for whoever has proved to belong to the world."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._values: dict[bytes, bytes] = {}
        self._lock = threading.Lock()
        self._unproved: dict[socket.socket, None] = {}

    def let_in(self, peer: socket.socket) -> None:
        """Serve a client in a thread of its own."""
        with self._lock:
            self._unproved[peer] = None
            oldest = next(iter(self._unproved)) if len(self._unproved) > _MOST_UNPROVED else None
            if oldest is not None:
                del self._unproved[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)  # its thread closes it
        threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        """Answer one client until it hangs up."""
        with peer, contextlib.suppress(OSError, struct.error, ValueError):
            try:
                peer.settimeout(_PROVE_WITHIN_S)
                accept_proof(peer, self._secret, "store")
                peer.settimeout(None)
            finally:
                with self._lock:
                    self._unproved.pop(peer, None)
            while True:
                word, *fields = receive_fields(peer)
                with self._lock:
                    answer = self._answer(word, fields)
                peer.sendall(pack(answer))

    def _answer(self, word: bytes, fields: list[bytes]) -> list[bytes]:
        values = self._values
        if word == b"set":
            values[fields[0]] = fields[1]
            return []
        if word == b"get":  # all of them, or nothing
            return [values[key] for key in fields] if all(key in values for key in fields) else []
        if word == b"check":
            return [b"1"] if all(key in values for key in fields) else []
        if word == b"add":
            values[fields[0]] = str(int(values.get(fields[0], b"0")) + int(fields[1])).encode()
            return [values[fields[0]]]
        if word == b"append":
            values[fields[0]] = values.get(fields[0], b"") + fields[1]
            return []
        if word == b"delete":
            return [b"1"] if values.pop(fields[0], None) is not None else []
        raise ValueError(word)


def main() -> None:
    """Serve a store while the process that has started this one lives and keeps its connection.

    Arguments: descriptors of a listening socket and of the owner's connection. The secret comes over the latter, for
    every user can read the arguments of a process.
    """
    listener, owner = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    parent = os.getppid()
    (secret,) = receive_fields(owner)
    store = _Store(secret)
    while os.getppid() == parent:  # a fork of the owner may hold its connection open
        ready, _, _ = select.select([listener, owner], [], [], _OWNER_LOOK_S)
        if owner in ready:
            return
        if listener in ready:
            try:
                peer, _ = listener.accept()
            except OSError:  # it has hung up already; or no descriptor is left, until somebody else does
                select.select([owner], [], [], _NAP_S)
                continue
            if same_user(peer):
                store.let_in(peer)
            else:
                peer.close()


if __name__ == "__main__":
    main()

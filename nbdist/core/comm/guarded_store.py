"""The store of a cluster: as torch's TCPStore, for one user only, who must know the world's secret."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import threading
import time
from typing import Any

import torch.distributed as dist

from nbdist.peer_auth import COMMAND, give_proof, pack, receive_fields

__all__ = ["GuardedStore", "host_store"]

_WAIT_WITHIN_S = 300.0
_NAP_S = 1e-3
_CONNECT_WITHIN_S = 10.0


class GuardedStore(dist.Store):
    """A connection to the store. Every call is one short question; safe to use from several threads. Local.

    Args:
        name: Where the store listens.
        secret: The world's, in hexadecimal digits. With the name it is the store's `address`.

    Raises:
        OSError: Nobody listens there any more, or who does is an intruder.
    """

    def __init__(self, name: str, secret: str) -> None:
        super().__init__()
        self.address = name, secret
        self.secret = bytes.fromhex(secret)
        self._lock = threading.Lock()
        self._peer: socket.socket | None = self._connect()
        self._owned: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    @classmethod
    def host(cls) -> GuardedStore:
        """See `host_store`."""
        secret = secrets.token_hex(32)
        abstract = sys.platform == "linux"  # sockets without a name in the file system; there alone
        ours, theirs = socket.socketpair()
        with theirs, socket.socket(socket.AF_UNIX if abstract else socket.AF_INET) as listener:
            listener.bind(f"\0nbdist-{secrets.token_hex(16)}" if abstract else ("127.0.0.1", 0))
            listener.listen(128)
            told = listener.getsockname()
            passed = listener.fileno(), theirs.fileno()
            server = subprocess.Popen(
                [sys.executable, "-I", "-S", COMMAND, *map(str, passed)], pass_fds=passed,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        ours.sendall(pack([bytes.fromhex(secret)]))
        try:
            store = cls(told.decode() if abstract else "{}:{}".format(*told), secret)
        except BaseException:
            ours.close()
            server.wait()
            raise
        store._owned = server, ours
        return store

    def _connect(self) -> socket.socket:
        name = self.address[0]
        host, _, port = name.rpartition(":")
        peer = socket.socket(socket.AF_INET if host else socket.AF_UNIX)
        try:
            peer.settimeout(_CONNECT_WITHIN_S)
            self._call(peer, (host, int(port)) if host else name)
            give_proof(peer, self.secret, "store")
            peer.settimeout(None)
        except BaseException:
            peer.close()
            raise
        return peer

    @staticmethod
    def _call(peer: socket.socket, address: Any) -> None:
        deadline = time.monotonic() + _CONNECT_WITHIN_S
        while True:
            try:
                return peer.connect(address)
            except BlockingIOError:  # more call than can wait: a unix socket with a timeout does not wait for its turn
                if time.monotonic() > deadline:
                    raise
                time.sleep(_NAP_S)

    def __del__(self) -> None:
        if getattr(self, "_peer", None) is not None:
            self._peer.close()  # type: ignore[union-attr]
        if getattr(self, "_owned", None) is not None:
            server, ours = self._owned  # type: ignore[misc]
            ours.close()
            server.kill()
            server.wait()

    @property
    def server_pid(self) -> int:
        """The process that serves the store, where this one has started it; else 0."""
        return 0 if self._owned is None else self._owned[0].pid

    @property
    def lives(self) -> bool:
        """Whether the process that serves the store runs, as far as who has started it can tell."""
        return self._owned is None or self._owned[0].poll() is None

    def set(self, key: str, value: Any) -> None:
        """Write."""
        self._ask(b"set", key.encode(), value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """Wait for a key, and read it."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for keys, and read them."""
        if not keys:
            return []
        deadline = time.monotonic() + _WAIT_WITHIN_S
        while not (values := self._ask(b"get", *(key.encode() for key in keys))):
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody wrote {', '.join(keys)} within {_WAIT_WITHIN_S:g} s")
            time.sleep(_NAP_S)
        return values

    def add(self, key: str, amount: int) -> int:
        """Add to a number; returns the sum."""
        return int(self._ask(b"add", key.encode(), str(amount).encode())[0])

    def append(self, key: str, value: Any) -> None:
        """Write behind what is there, as a whole or not at all."""
        self._ask(b"append", key.encode(), value.encode() if isinstance(value, str) else bytes(value))

    def delete_key(self, key: str) -> bool:
        """Remove; returns whether it was there."""
        return bool(self._ask(b"delete", key.encode()))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are there."""
        return bool(self._ask(b"check", *(key.encode() for key in keys)))

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """Wait until all keys are there."""
        self.multi_get(keys)

    def _ask(self, *fields: bytes) -> list[bytes]:
        with self._lock:
            peer, self._peer = self._peer or self._connect(), None
            try:
                peer.sendall(pack(fields))
                answer = receive_fields(peer)
            except BaseException:  # interrupted: the answer would be taken for that to the next question
                peer.close()
                raise
            self._peer = peer
            return answer


def host_store() -> GuardedStore:
    """Host a store for ranks to meet in, in a process that ends with the store. Local: called outside the ranks."""
    return GuardedStore.host()

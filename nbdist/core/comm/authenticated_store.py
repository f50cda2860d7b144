"""The key-value store of a cluster: like torch's TCPStore, but only for this user and with the world's secret."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from nbdist.keepalive import keep_alive
from nbdist.listening import listen_on
from nbdist.peer_auth import authenticate_as_client, pack, receive_fields

__all__ = ["GuardedStore", "host_store"]

# Isolated and without site-packages, for speed; nbdist comes last, so that it hides no standard module.
_COMMAND = "import sys; sys.path.append(sys.argv.pop(1)); from nbdist.store_server import main; main()"
_TIMEOUT_S = 300.0
_PACKAGES = str(Path(__file__).parents[3])
_POLL_S = 1e-3
_CONNECT_TIMEOUT_S = 10.0


class GuardedStore(dist.Store):
    """A client of the store. Every call is one short request; safe to use from several threads. Local.

    Args:
        name: Where the store listens.
        secret: The world's secret, in hexadecimal digits. With the name it is the store's `address`.

    Raises:
        OSError: No process listens there any more, or the one that does fails authentication.
    """

    def __init__(self, name: str, secret: str) -> None:
        super().__init__()
        self.address = name, secret
        self.secret = bytes.fromhex(secret)
        self._lock = threading.Lock()
        self._peer: socket.socket | None = self._connect()
        self._server: tuple[subprocess.Popen[bytes], socket.socket] | None = None

    @classmethod
    def host(cls, address: str = "") -> GuardedStore:
        """See `host_store`."""
        secret = secrets.token_hex(32)
        # Only Linux has abstract sockets, without a name in the file system.
        abstract = sys.platform == "linux" and not address
        owner_end, server_end = socket.socketpair()
        with (
            server_end,
            socket.socket(socket.AF_UNIX) if abstract else listen_on(address or "127.0.0.1", 128) as listener,
        ):
            if abstract:
                listener.bind(f"\0nbdist-{secrets.token_hex(16)}")
                listener.listen(128)
            bound = listener.getsockname()
            passed = listener.fileno(), server_end.fileno()
            server = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _COMMAND, _PACKAGES, *map(str, passed)], pass_fds=passed,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        owner_end.sendall(pack([bytes.fromhex(secret)]))
        try:
            store = cls(bound.decode() if abstract else "{}:{}".format(*bound), secret)
        except BaseException:
            owner_end.close()
            server.wait()
            raise
        store._server = server, owner_end
        return store

    def _connect(self) -> socket.socket:
        name = self.address[0]
        host, _, port = name.rpartition(":")
        peer = socket.socket(socket.AF_INET if host else socket.AF_UNIX)
        try:
            peer.settimeout(_CONNECT_TIMEOUT_S)
            self._connect_socket(peer, (host, int(port)) if host else name)
            keep_alive(peer)
            authenticate_as_client(peer, self.secret, "store")
            peer.settimeout(None)
        except BaseException:
            peer.close()
            raise
        return peer

    @staticmethod
    def _connect_socket(peer: socket.socket, address: Any) -> None:
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        while True:
            try:
                return peer.connect(address)
            except BlockingIOError:  # the backlog is full: a unix socket with a timeout does not wait for a place
                if time.monotonic() > deadline:
                    raise
                time.sleep(_POLL_S)

    def __del__(self) -> None:
        if getattr(self, "_peer", None) is not None:
            self._peer.close()  # type: ignore[union-attr]
        if getattr(self, "_server", None) is not None:
            server, owner_end = self._server  # type: ignore[misc]
            owner_end.close()
            server.kill()
            server.wait()

    @property
    def server_pid(self) -> int:
        """Pid of the store's server, if this process has started it; else 0."""
        return 0 if self._server is None else self._server[0].pid

    @property
    def lives(self) -> bool:
        """Whether the store's server runs; always true in a process that did not start it."""
        return self._server is None or self._server[0].poll() is None

    def set(self, key: str, value: Any) -> None:
        """Set a key."""
        self._request(b"set", key.encode(), value.encode() if isinstance(value, str) else bytes(value))

    def get(self, key: str) -> bytes:
        """Wait for a key and return its value."""
        return self.multi_get([key])[0]

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """Wait for keys and return their values."""
        if not keys:
            return []
        deadline = time.monotonic() + _TIMEOUT_S
        while not (values := self._request(b"get", *(key.encode() for key in keys))):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no rank wrote {', '.join(keys)} within {_TIMEOUT_S:g} s")
            time.sleep(_POLL_S)
        return values

    def add(self, key: str, amount: int) -> int:
        """Add to a number; returns the sum."""
        return int(self._request(b"add", key.encode(), str(amount).encode())[0])

    def append(self, key: str, value: Any) -> None:
        """Append to a key's value, atomically."""
        self._request(b"append", key.encode(), value.encode() if isinstance(value, str) else bytes(value))

    def delete_key(self, key: str) -> bool:
        """Remove a key; returns whether it existed."""
        return bool(self._request(b"delete", key.encode()))

    def check(self, keys: list[str]) -> bool:
        """Whether all keys are set."""
        return bool(self._request(b"check", *(key.encode() for key in keys)))

    def wait(self, keys: list[str], timeout: Any = None) -> None:
        """Wait until all keys are set."""
        self.multi_get(keys)

    def _request(self, *fields: bytes) -> list[bytes]:
        with self._lock:
            peer, self._peer = self._peer or self._connect(), None
            try:
                peer.sendall(pack(fields))
                answer = receive_fields(peer)
            except BaseException:  # interrupted: the late answer would be read as the answer to the next request
                peer.close()
                raise
            self._peer = peer
            return answer


def host_store(address: str = "") -> GuardedStore:
    """Start a store for the ranks' rendezvous, in a process that ends with the object. Local, outside the ranks.

    Args:
        address: This host's address where ranks of other hosts reach it; by default it serves this host alone.
    """
    return GuardedStore.host(address)

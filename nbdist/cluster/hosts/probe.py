"""Probe: a small program that `doctor` runs on each host; it listens, connects and reads what it is asked to.

One request a line on standard input, as JSON, one answer a line on standard output. It ends with its input.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from nbdist.listening import listen_on

__all__ = ["Listener", "connect", "main"]

_TOKEN_BYTES, _BACKLOG = 16, 16
_WITHIN_S = 5.0
_PIECE = bytes(1 << 16)


class Listener:
    """Receives from whoever knows its token, and sends as much back.

    Attributes:
        port: On all addresses of this host.
        token: What a peer has to begin with.
    """

    def __init__(self) -> None:
        self._socket = listen_on("", _BACKLOG)
        self.port = int(self._socket.getsockname()[1])
        self.token = secrets.token_hex(_TOKEN_BYTES // 2)
        threading.Thread(target=self._serve, daemon=True, name="nbdist-probe").start()

    def close(self) -> None:
        """Stop listening. Twice is fine."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # else `accept` goes on
        self._socket.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                peer, _ = self._socket.accept()
                threading.Thread(target=self._answer, args=(peer,), daemon=True).start()

    def _answer(self, peer: socket.socket) -> None:
        with peer, contextlib.suppress(OSError):
            peer.settimeout(_WITHIN_S)
            if _received(peer, _TOKEN_BYTES) == self.token.encode():
                count = int.from_bytes(_received(peer, 8), "little")
                _skip(peer, count)
                peer.sendall(b"1")
                _send(peer, count)


def connect(address: str, port: int, token: str, count: int) -> tuple[float, float]:
    """Connect to a `Listener`, send so many bytes, and receive as many; returns the seconds of both.

    Raises:
        OSError: There is no way, or another program answers there.
    """
    with socket.create_connection((address, port), timeout=_WITHIN_S) as peer:
        peer.sendall(token.encode() + count.to_bytes(8, "little"))
        began_s = time.monotonic()
        _send(peer, count)
        if _received(peer, 1) != b"1":
            raise ConnectionError("another program answers there")
        sent_s = time.monotonic()
        _skip(peer, count)
        return sent_s - began_s, time.monotonic() - sent_s


def _send(peer: socket.socket, count: int) -> None:
    for start in range(0, count, len(_PIECE)):
        peer.sendall(_PIECE[: count - start])


def _skip(peer: socket.socket, count: int) -> None:
    while count:
        part = len(peer.recv(min(count, len(_PIECE))))
        if not part:
            raise ConnectionError("the connection was closed")
        count -= part


def _received(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (part := peer.recv(count - len(data))):
        data += part
    return data


class _Probe:
    """What can be asked of it."""

    def __init__(self) -> None:
        self._listener = Listener()

    def listener(self) -> list[Any]:
        """Its port and token."""
        return [self._listener.port, self._listener.token]

    def connect(self, address: str, port: int, token: str, count: int) -> list[float]:
        """See `connect`."""
        return [*connect(address, port, token, count)]

    def time(self) -> float:
        """Of this host's clock, in seconds."""
        return time.time()

    def read(self, path: str) -> str:
        """A file."""
        with open(path, encoding="utf-8") as file:
            return file.read()

    def facts(self) -> dict[str, Any]:
        """Python here, and the versions of what must be the same on all hosts; no version of what is missing."""
        from nbdist.cluster.hosts.local_host import versions

        return {"python": sys.executable, "versions": versions()}


def main() -> None:
    """Entry point."""
    probe = _Probe()
    for line in sys.stdin:
        kind, *arguments = json.loads(line)
        ask: Callable[..., Any] = getattr(probe, kind)
        try:
            answer = [ask(*arguments), ""]
        except OSError as error:
            answer = [None, os.strerror(error.errno) if error.errno else str(error)]
        except Exception as error:
            answer = [None, f"{type(error).__name__}: {error}"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

"""Point-to-point messages over TCP, for two ranks on different hosts and CPU tensors.

A thread sends, so that a send waits for no other rank and a message travels while this rank computes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import struct
import threading
import time
from typing import Any

import torch

from nbdist.core.comm.comm_timer import comm_timer
from nbdist.core.comm.p2p import Link, Message, dtype_named, pack_note, unpack_note
from nbdist.core.comm.peer_sockets import connect, memory_of, open_sockets, receive_exactly
from nbdist.errors import PeerLostError

__all__ = ["TcpLink"]

_LENGTH = struct.Struct("!I")


class TcpLink(Link):
    """A link to a peer on another host. **Collective** over the two ranks.

    A message is a length, a header and the bytes of its tensors.

    Args:
        rank: This rank.
        peer: The other rank.
        store: For the rendezvous.
        name: Unique to this link among the users of `store`.
        address: Of this host, where the peer reaches it.
    """

    def __init__(self, rank: int, peer: int, store: Any, name: str, address: str) -> None:
        (self._socket,) = connect(rank, [peer], store, name, address)
        self._unsent: queue.SimpleQueue[list[memoryview] | None] = queue.SimpleQueue()
        self._failure: OSError | None = None
        self._owner = os.getpid()
        self._thread = threading.Thread(target=self._send_all, daemon=True, name="nbdist-link")
        self._thread.start()
        open_sockets.add(self)

    @comm_timer.communicating()
    def send(self, note: Any, tensors: list[torch.Tensor | None]) -> None:
        """See `Link`."""
        if self._failure is not None:
            raise PeerLostError(f"a message could not be sent, another rank is gone ({self._failure}).")
        own = [None if t is None else t.detach().resolve_conj().resolve_neg() for t in tensors]
        header = pack_note([note, [None if t is None else (str(t.dtype)[6:], list(t.shape)) for t in own]])
        parts = [memoryview(_LENGTH.pack(len(header)) + header)]
        # A copy each, because the caller may change its tensors before they are sent.
        parts += [memory_of(t.clone(memory_format=torch.contiguous_format)) for t in own if t is not None and t.numel()]
        self._unsent.put(parts)

    @comm_timer.communicating()
    def receive(self) -> Message:
        """See `Link`."""
        began_s = time.perf_counter()
        try:
            (length,) = _LENGTH.unpack(receive_exactly(self._socket, _LENGTH.size))
            comm_timer.waiting += time.perf_counter() - began_s
            note, specs = unpack_note(receive_exactly(self._socket, length))
            return note, [None if spec is None else self._receive_tensor(*spec) for spec in specs]
        except OSError as error:
            raise PeerLostError(f"a message did not arrive, another rank is gone ({error}).") from error

    def close(self) -> None:
        """See `Link`; what is not sent yet is dropped."""
        if self._owner == os.getpid():  # a fork's shutdown would end this process's connection
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # also ends the thread's wait
        self._socket.close()
        self._unsent.put(None)

    def _receive_tensor(self, name: str, shape: list[int]) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype_named(name))
        memory, start = memory_of(tensor) if tensor.numel() else memoryview(b""), 0
        while start < len(memory):
            count = self._socket.recv_into(memory[start:])
            if not count:
                raise PeerLostError("a message did not arrive, another rank is gone (its connection closed).")
            start += count
        return tensor

    def _send_all(self) -> None:
        try:
            while (parts := self._unsent.get()) is not None:
                for part in parts:
                    self._socket.sendall(part)
        except OSError as error:
            self._failure = error

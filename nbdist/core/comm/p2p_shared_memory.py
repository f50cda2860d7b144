"""A link through shared memory, for two ranks on one host and tensors on the CPU.

The sender copies tensors into a segment and says over a Unix socket where they are; the receiver copies them out and
says that it has. So sending waits for nobody, and a segment is used again as soon as it is free.
"""

from __future__ import annotations

import contextlib
import mmap
import socket
import struct
import time
from typing import Any

import torch

from nbdist.core.comm.comm_timer import comm_timer
from nbdist.core.comm.p2p import Link, Message, Place, dtype_named, pack_note, unpack_note
from nbdist.core.comm.shared_memory import SPIN_S, connect, open_sockets, receive_exactly, receive_file
from nbdist.core.transfer.payload import Segment
from nbdist.errors import PeerLostError
from nbdist.plan import available_cores

__all__ = ["SharedMemoryLink"]

_ALIGNMENT = 64
_PAGE = 4096
_IN_FLIGHT = 64
"""Segments that may be on their way; with more of them a sender that runs ahead waits."""
_NUMBER = struct.Struct("!Q")
_FRAME = struct.Struct("!cI")  # what follows, and its length


class SharedMemoryLink(Link):
    """To one peer on this host. **Collective** over the two ranks.

    Args:
        rank: This rank.
        peer: The other one.
        store: Where they find each other.
        name: Unique to this link among the users of `store`.
        size: Ranks of the host, for whether each has a core.
    """

    def __init__(self, rank: int, peer: int, store: Any, name: str, size: int) -> None:
        (self._socket,) = connect(int(rank > peer), 2, store, name)
        open_sockets.add(self)
        self._spin_s = SPIN_S if size <= available_cores() else 0.0
        self._free: list[Segment] = []
        self._away: dict[int, Segment] = {}
        self._inbox: list[bytes] = []
        self._maps: dict[int, torch.Tensor] = {}

    @comm_timer.communicating()
    def send(self, note: Any, tensors: list[torch.Tensor | None]) -> None:
        """See `Link`."""
        end = 0
        places: list[Place | None] = []
        for tensor in tensors:
            if tensor is None:
                places.append(None)
                continue
            places.append((str(tensor.dtype)[6:], list(tensor.shape), end))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        where = None
        if end:
            segment = self._take(end)
            where = segment.number
            memory = torch.frombuffer(segment.buffer, dtype=torch.uint8)
            for tensor, place in zip(tensors, places, strict=True):
                if tensor is not None and place is not None:
                    _at(memory, place).copy_(tensor.detach())
        self._write(b"D", pack_note([note, where, places]))

    @comm_timer.communicating()
    def receive(self) -> Message:
        """See `Link`."""
        began_s = time.perf_counter()
        while not self._inbox:
            self._read()
        comm_timer.idle += time.perf_counter() - began_s
        note, where, places = unpack_note(self._inbox.pop(0))
        memory = torch.empty(0, dtype=torch.uint8) if where is None else self._maps[where]
        tensors = [None if place is None else _at(memory, place).clone() for place in places]
        if where is not None:
            self._write(b"F", _NUMBER.pack(where))
        return note, tensors

    def close(self) -> None:
        """See `Link`."""
        self._socket.close()
        for segment in (*self._free, *self._away.values()):
            segment.close()
        self._free, self._away, self._maps = [], {}, {}

    def _take(self, nbytes: int) -> Segment:
        """A segment of at least `nbytes` that the peer has let go of."""
        while self._read(wait=len(self._away) >= _IN_FLIGHT):
            pass
        fitting = [segment for segment in self._free if segment.size >= nbytes]
        if fitting:
            segment = min(fitting, key=lambda segment: segment.size)
            self._free.remove(segment)
        else:
            if self._free:  # grown out of: its memory is of no more use
                old = self._free.pop()
                self._write(b"C", _NUMBER.pack(old.number))
                old.close()
            segment = Segment(-(-nbytes // _PAGE) * _PAGE)
            self._write(b"M", _NUMBER.pack(segment.number))
            try:
                socket.send_fds(self._socket, [b"\0"], [segment.descriptor])
            except OSError as error:
                raise PeerLostError(f"a message could not be sent, another rank is gone ({error}).") from error
        self._away[segment.number] = segment
        return segment

    def _write(self, kind: bytes, body: bytes) -> None:
        try:
            self._socket.sendall(_FRAME.pack(kind, len(body)) + body)
        except OSError as error:
            raise PeerLostError(f"a message could not be sent, another rank is gone ({error}).") from error

    def _read(self, wait: bool = True) -> bool:
        """Take in one frame; without `wait` only one that is there already. Returns whether there was one."""
        try:
            if not self._arrived() and not wait:
                return False
            kind, length = _FRAME.unpack(receive_exactly(self._socket, _FRAME.size))
            body = receive_exactly(self._socket, length)
        except OSError as error:
            raise PeerLostError(f"a message did not arrive, another rank is gone ({error}).") from error
        if kind == b"D":
            self._inbox.append(body)
            return True
        (number,) = _NUMBER.unpack(body)
        if kind == b"M":
            with receive_file(self._socket) as file:
                self._maps[number] = torch.frombuffer(mmap.mmap(file, 0), dtype=torch.uint8)
        elif kind == b"C":
            del self._maps[number]
        else:
            self._free.append(self._away.pop(number))
        return True

    def _arrived(self) -> bool:
        """Look for a frame, for a moment."""
        until_s = time.perf_counter() + self._spin_s
        while True:
            with contextlib.suppress(BlockingIOError):
                self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
                return True
            if time.perf_counter() >= until_s:
                return False


def _at(memory: torch.Tensor, place: Place) -> torch.Tensor:
    name, shape, start = place
    dtype = dtype_named(name)
    numel = int(torch.Size(shape).numel())
    return memory[start : start + numel * dtype.itemsize].view(dtype).view(shape)

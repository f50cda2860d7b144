"""Point-to-point messages through shared memory, for two ranks on one host and CPU tensors.

The sender copies tensors into a segment and sends their offsets over a Unix socket; the receiver copies them out and
sends the segment's number back. So a send waits for no other rank, and a segment is reused as soon as it is free.
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
from nbdist.core.comm.p2p import Link, Message, TensorSpec, dtype_named, pack_note, unpack_note
from nbdist.core.comm.peer_sockets import connect, open_sockets, receive_exactly
from nbdist.core.comm.shared_memory import SPIN_S, receive_file, send_file
from nbdist.core.transfer.payload import Segment
from nbdist.errors import PeerLostError
from nbdist.plan import available_cores

__all__ = ["SharedMemoryLink"]

_ALIGNMENT = 64
_PAGE = 4096
_IN_FLIGHT = 64
"""Segments in use at once; a sender that is this far ahead waits for the receiver."""
_NUMBER = struct.Struct("!Q")
_FRAME = struct.Struct("!cI")  # kind and length; D: message, F: segment is free, M: map a new segment, C: unmap one


class SharedMemoryLink(Link):
    """A link to a peer on this host. **Collective** over the two ranks.

    Args:
        rank: This rank.
        peer: The other rank.
        store: For the rendezvous.
        name: Unique to this link among the users of `store`.
        size: Ranks on this host: if each has a core, waits spin before they sleep.
    """

    def __init__(self, rank: int, peer: int, store: Any, name: str, size: int) -> None:
        (self._socket,) = connect(rank, [peer], store, name)
        open_sockets.add(self)
        self._spin_s = SPIN_S if size <= available_cores() else 0.0
        self._free: list[Segment] = []
        self._in_use: dict[int, Segment] = {}
        self._inbox: list[bytes] = []
        self._maps: dict[int, torch.Tensor] = {}

    @comm_timer.communicating()
    def send(self, note: Any, tensors: list[torch.Tensor | None]) -> None:
        """See `Link`."""
        end = 0
        specs: list[TensorSpec | None] = []
        for tensor in tensors:
            if tensor is None:
                specs.append(None)
                continue
            specs.append((str(tensor.dtype)[6:], list(tensor.shape), end))
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        number = None
        if end:
            segment = self._take(end)
            number = segment.number
            memory = torch.frombuffer(segment.buffer, dtype=torch.uint8)
            for tensor, spec in zip(tensors, specs, strict=True):
                if tensor is not None and spec is not None:
                    _view(memory, spec).copy_(tensor.detach())
        self._write(b"D", pack_note([note, number, specs]))

    @comm_timer.communicating()
    def receive(self) -> Message:
        """See `Link`."""
        began_s = time.perf_counter()
        while not self._inbox:
            self._read()
        comm_timer.waiting += time.perf_counter() - began_s
        note, number, specs = unpack_note(self._inbox.pop(0))
        memory = torch.empty(0, dtype=torch.uint8) if number is None else self._maps[number]
        tensors = [None if spec is None else _view(memory, spec).clone() for spec in specs]
        if number is not None:
            self._write(b"F", _NUMBER.pack(number))
        return note, tensors

    def close(self) -> None:
        """See `Link`."""
        self._socket.close()
        for segment in (*self._free, *self._in_use.values()):
            segment.close()
        self._free, self._in_use, self._maps = [], {}, {}

    def _take(self, nbytes: int) -> Segment:
        """A segment of at least `nbytes` that the peer does not use: a free one, or a new one."""
        while self._read(wait=len(self._in_use) >= _IN_FLIGHT):
            pass
        fitting = [segment for segment in self._free if segment.size >= nbytes]
        if fitting:
            segment = min(fitting, key=lambda segment: segment.size)
            self._free.remove(segment)
        else:
            if self._free:  # messages have outgrown it
                old = self._free.pop()
                self._write(b"C", _NUMBER.pack(old.number))
                old.close()
            segment = Segment(-(-nbytes // _PAGE) * _PAGE)
            self._write(b"M", _NUMBER.pack(segment.number))
            send_file(self._socket, segment.descriptor)
        self._in_use[segment.number] = segment
        return segment

    def _write(self, kind: bytes, body: bytes) -> None:
        try:
            self._socket.sendall(_FRAME.pack(kind, len(body)) + body)
        except OSError as error:
            raise PeerLostError(f"a message could not be sent, another rank is gone ({error}).") from error

    def _read(self, wait: bool = True) -> bool:
        """Read and handle one frame; without `wait` only one that has arrived. Returns whether there was one."""
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
            self._free.append(self._in_use.pop(number))
        return True

    def _arrived(self) -> bool:
        """Whether a frame is there; spins for `_spin_s`, because waking from a blocking read takes longer."""
        until_s = time.perf_counter() + self._spin_s
        while True:
            with contextlib.suppress(BlockingIOError):
                self._socket.recv(1, socket.MSG_DONTWAIT | socket.MSG_PEEK)
                return True
            if time.perf_counter() >= until_s:
                return False


def _view(memory: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    name, shape, start = spec
    dtype = dtype_named(name)
    numel = int(torch.Size(shape).numel())
    return memory[start : start + numel * dtype.itemsize].view(dtype).view(shape)

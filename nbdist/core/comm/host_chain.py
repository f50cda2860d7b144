"""The chain of hosts: tensors travel over TCP between the leaders of neighbouring hosts, in pieces, both ways at once.

A sum goes up: each leader adds the tensors of its host to the sum of the hosts before, and sends it on. The total comes
down while later pieces still go up. So each connection carries a tensor once each way, however many hosts and ranks
there are, and the sum has the bits of one in rank order. Leaders exchange what a collective is for before its bytes.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import select
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nbdist.core.comm.collective_tag import TAG_BYTES, CollectiveTag, mismatch_error
from nbdist.core.comm.comm_timer import comm_timer
from nbdist.core.comm.peer_sockets import connect, memory_of, open_sockets, receive_exactly, shut_down
from nbdist.errors import PeerLostError, PlanError

__all__ = ["HostChain"]

_PIECES = 16
_PIECE_BYTES = range(64 << 10, 1 << 18)
"""A sum goes on in a sixteenth of a tensor, within these limits: small ones overlap better, large ones cost less."""
_LENGTH_BYTES = 4


class _Stream:
    """Bytes that a socket sends, or receives, in order.

    Args:
        peer: The socket.
        parts: The memory of them, part by part.
        ready: How many bytes may be sent by now; None for a stream that receives.
        received: Called with the index of each part that has come.
    """

    def __init__(
        self, peer: socket.socket, parts: Sequence[memoryview], ready: Callable[[], int] | None = None,
        received: Callable[[int], None] = lambda index: None,
    ) -> None:  # fmt: skip
        self.peer = peer
        self._parts = parts
        self._ends = list(itertools.accumulate(len(part) for part in parts))
        self._ready = ready
        self._received = received
        self._index = 0
        self.moved = 0

    @property
    def done(self) -> bool:
        """Whether all has been moved."""
        return self._index == len(self._parts)

    @property
    def event(self) -> int:
        """What to poll for; 0 where there is nothing to send yet."""
        if self._ready is None:
            return select.POLLIN
        return select.POLLOUT if self._ready() > self.moved else 0

    def move(self) -> bool:
        """Move what can be moved without waiting; returns whether that was something."""
        before = self.moved
        with contextlib.suppress(BlockingIOError):
            while not self.done:
                part, end = self._parts[self._index], self._ends[self._index]
                start = len(part) - (end - self.moved)
                if self._ready is not None:
                    stop = min(len(part), start + self._ready() - self.moved)
                    if stop == start and len(part):
                        break
                    self.moved += self.peer.send(part[start:stop], socket.MSG_DONTWAIT) if stop > start else 0
                elif start < len(part):
                    count = self.peer.recv_into(part[start:], 0, socket.MSG_DONTWAIT)
                    if not count:
                        raise PeerLostError("a collective ended early, another rank is gone (its connection closed).")
                    self.moved += count
                if self.moved == end:
                    self._index += 1
                    if self._ready is None:
                        self._received(self._index - 1)
        return self.moved > before


class HostChain:
    """This host's place in the chain, in the leader's process. **Collective** over all leaders, as all its methods.

    Args:
        leaders: The first rank of each host, in rank order.
        rank: This leader.
        store: For the rendezvous.
        name: Unique to this chain among the users of `store`.
        address: Of this host, where the others reach it.

    Attributes:
        host: This host's position.

    Raises:
        PeerLostError: Another leader is gone; so does each method.
    """

    def __init__(self, leaders: Sequence[int], rank: int, store: Any, name: str, address: str) -> None:
        self.host = leaders.index(rank)
        self._leaders = leaders
        neighbours = [other for host, other in enumerate(leaders) if abs(host - self.host) == 1]
        self._peers = dict(zip(neighbours, connect(rank, neighbours, store, name, address), strict=True))
        self._before = self._peers[neighbours[0]] if self.host > 0 else None
        self._after = self._peers[neighbours[-1]] if self.host < len(leaders) - 1 else None
        open_sockets.add(self)

    def hang_up(self) -> None:
        """See `HierarchicalChannel.hang_up`."""
        shut_down(self._peers.values())

    def close(self) -> None:
        """Close: leaders that wait for this one get an error. Local, twice is fine."""
        for peer in self._peers.values():
            peer.close()

    def sum_(
        self, slabs: Sequence[torch.Tensor], tag: CollectiveTag, kept: int | None = None, passed: int | None = None
    ) -> None:  # fmt: skip
        """Replace the first of this host's tensors by the sum of those of all hosts, in rank order.

        Args:
            slabs: The tensors of this host's ranks, flat, contiguous and of one length.
            tag: What for.
            kept: How many first elements of the total this host needs; by default all. Later ones may be part of it.
            passed: How many of those a host before this one needs.
        """
        self._agree(tag)
        flat = slabs[0]
        size = flat.itemsize
        pieces = _pieces(flat.numel(), size)
        memory = memory_of(flat)
        arriving = flat.new_empty(pieces[0].stop if pieces and self._before is not None else 0)
        summed = 0  # bytes

        def add(index: int) -> None:
            nonlocal summed
            part, own = pieces[index], flat[pieces[index]]
            if self._before is not None:
                torch.add(arriving[: len(own)], own, out=own)
            for slab in slabs[1:]:
                own.add_(slab[part])
            summed = part.stop * size

        def add_next() -> bool:
            """On the first host, which waits for no other: the next piece, if one is left."""
            if self._before is not None or summed == len(memory):
                return False
            add(summed // (pieces[0].stop * size))
            return True

        kept_bytes, passed_bytes = (size * (flat.numel() if n is None else n) for n in (kept, passed))
        streams: list[_Stream] = []
        down: _Stream | None = None
        if self._after is not None:
            down = _Stream(self._after, [memory[:kept_bytes]])
            streams += [_Stream(self._after, [memory], lambda: summed), down]
        if self._before is not None:
            temporary = memory_of(arriving)
            up = [temporary[: (part.stop - part.start) * size] for part in pieces]
            streams.append(_Stream(self._before, up, received=add))
            total = (lambda: summed) if down is None else (lambda: down.moved)
            streams.append(_Stream(self._before, [memory[:passed_bytes]], total))
        self._move(streams, add_next)

    def broadcast_(self, tensor: torch.Tensor, source: int, tag: CollectiveTag) -> None:
        """Replace `tensor`, flat and contiguous, by that of host `source`."""
        self._agree(tag)
        memory = [memory_of(tensor)]
        ways = [(self._before, self._after), (self._after, self._before)]
        if source == self.host:
            self._move([_Stream(peer, memory, lambda: len(memory[0])) for peer in self._peers.values()])
            return
        here, there = ways[source > self.host]
        assert here is not None
        arriving = _Stream(here, memory)
        self._move([arriving, *([] if there is None else [_Stream(there, memory, lambda: arriving.moved)])])

    def all_gather(self, blocks: Sequence[torch.Tensor], tag: CollectiveTag) -> None:
        """Fill each host's block, contiguous, with the one that it has.

        Args:
            blocks: A tensor a host, of any sizes; the sizes are the same on all hosts.
            tag: What for.
        """
        self._agree(tag)
        memory = [memory_of(block) for block in blocks]
        own = len(memory[self.host])
        earlier, later = memory[: self.host][::-1], memory[self.host + 1 :]
        streams: list[_Stream] = []
        for source, target, arriving in ((self._before, self._after, earlier), (self._after, self._before, later)):
            came = None if source is None else _Stream(source, arriving)
            if target is not None:
                ready = functools.partial(_own_and_moved, own, came)
                streams.append(_Stream(target, [memory[self.host], *arriving], ready))
            streams += [] if came is None else [came]
        self._move(streams)

    def _move(self, streams: list[_Stream], compute: Callable[[], bool] = lambda: False) -> None:
        """Move all bytes; where none can be moved, do what `compute` does, until it returns that nothing is left."""
        try:
            while streams:
                moved = sum(stream.move() for stream in streams)  # each of them, not the first that can
                streams = [stream for stream in streams if not stream.done]
                if moved or not streams or compute():
                    continue
                events: dict[int, int] = {}
                for stream in streams:
                    events[stream.peer.fileno()] = events.get(stream.peer.fileno(), 0) | stream.event
                poller = select.poll()
                for descriptor, event in events.items():
                    if event:
                        poller.register(descriptor, event)
                began_s = time.perf_counter()
                poller.poll()
                comm_timer.waiting += time.perf_counter() - began_s
        except OSError as error:
            raise PeerLostError(f"a collective ended early, another rank is gone ({error}).") from error

    def _agree(self, tag: CollectiveTag) -> None:
        """Compare what this collective is for with the neighbours.

        Raises:
            PlanError: A neighbour is in another one.
        """
        theirs = {rank: bytearray(TAG_BYTES) for rank in self._peers}
        packed = memoryview(tag.packed)
        streams = [_Stream(peer, [packed], lambda: TAG_BYTES) for peer in self._peers.values()]
        streams += [_Stream(peer, [memoryview(theirs[rank])]) for rank, peer in self._peers.items()]
        self._move(streams)
        if differing := [rank for rank, other in theirs.items() if other != tag.packed]:
            raise self._mismatch(tag.text, differing)

    def _mismatch(self, text: str, differing: list[int]) -> PlanError:
        """The error that names this leader's collective and that of neighbours in another one, which do the same."""
        sent = text.encode()
        texts = {self._leaders[self.host]: text}
        for rank in differing:
            with contextlib.suppress(OSError):
                self._peers[rank].sendall(len(sent).to_bytes(_LENGTH_BYTES, "little") + sent)
        for rank in differing:
            length = int.from_bytes(receive_exactly(self._peers[rank], _LENGTH_BYTES), "little")
            texts[rank] = receive_exactly(self._peers[rank], length).decode()
        return mismatch_error(texts)


def _own_and_moved(own: int, came: _Stream | None) -> int:
    return own + (0 if came is None else came.moved)


def _pieces(numel: int, itemsize: int) -> list[slice]:
    """The ranges of elements in which a sum goes from host to host."""
    nbytes = min(max(numel * itemsize // _PIECES, _PIECE_BYTES.start), _PIECE_BYTES.stop)
    width = max(1, nbytes // itemsize)
    return [slice(start, min(start + width, numel)) for start in range(0, numel, width)]

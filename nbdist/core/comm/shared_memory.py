"""Collectives through shared memory, for ranks on one host and CPU tensors.

Each arena is mapped by all ranks, and has a slab per rank. To all-reduce, each rank sums its own range of all slabs, in
rank order, and writes the sum back into them. The barrier is a tag over Unix sockets: a wait costs no processor time,
is interrupted at once, and ends when a peer does, for then its socket closes. The tag says what the barrier is for;
where tags differ, each rank sends what it is in, and all raise the same error.

Up to four ranks exchange tags directly. Of n ranks each sends one to three others in each of log4 n rounds: the
dissemination barrier of Hensgen, Finkel and Manber, "Two Algorithms for Barrier Synchronization" (1988), in base four.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nbdist.core.comm.channel import Channel, Done, Pending
from nbdist.core.comm.collective_tag import TAG_BYTES, CollectiveTag, mismatch_error, tag_of
from nbdist.core.comm.comm_timer import comm_timer
from nbdist.core.comm.common_memory import CommonMemory
from nbdist.core.comm.peer_sockets import connect, open_sockets, receive_exactly, shut_down
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.transfer.payload import Segment
from nbdist.errors import PeerLostError
from nbdist.plan import available_cores

__all__ = ["SPIN_S", "STAGING_BYTES", "SharedMemoryChannel", "barrier_exchanges", "receive_file", "send_file"]

_PAGE = 4096
_RADIX = 4
"""After each round of the barrier, a rank knows the tags of so many times as many ranks."""
_MIXED = b"\xff" * TAG_BYTES
"""In place of a tag: some ranks before the sender have different ones."""
SPIN_S = 1e-4
"""How long a wait spins before it sleeps, if each rank has a core: waking from sleep takes 20 to 50 us more."""
STAGING_BYTES = 1 << 20
"""Tensors outside of arenas are copied through an arena of this size, chunk by chunk."""


@dataclass(frozen=True, kw_only=True)
class _Arena:
    """Shared memory with one slab per rank, as bytes.

    Args:
        slabs: ``(bytes,)`` of uint8 each, in rank order.
        start: Address of this rank's slab.
        nbytes: Size of a slab.
    """

    slabs: list[torch.Tensor]
    start: int
    nbytes: int

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """For a tensor in this rank's slab, the same range of every slab, flat."""
        offset = tensor.data_ptr() - self.start
        return [slab[offset : offset + tensor.nbytes].view(tensor.dtype) for slab in self.slabs]


class SharedMemoryChannel(Channel):
    """The channel of ranks on one host. **Collective**: all of them construct it.

    Args:
        rank: This rank.
        size: How many ranks.
        store: For the rendezvous.
        name: Unique to this channel among the users of `store`.
    """

    def __init__(self, rank: int, size: int, store: Any, name: str) -> None:
        super().__init__(rank, size, torch.device("cpu"))
        self._peers = connect(rank, {*range(size)} - {rank}, store, name)
        others = dict(zip((other for other in range(size) if other != rank), self._peers, strict=True))
        self._exchanges = [
            [(others[(rank + step) % size], others[(rank - step) % size]) for step in steps]
            for steps in barrier_exchanges(size)
        ]
        open_sockets.add(self)
        self._spin_s = SPIN_S if size <= available_cores() else 0.0
        self._arenas: list[_Arena] = []
        try:
            self._staging = self._make_arena(STAGING_BYTES)
        except BaseException:
            self.close()
            raise

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in shared memory, all-reduced without a copy. **Collective**; see `Channel.zeros`."""
        nbytes = numel * torch.empty(0, dtype=dtype).itemsize
        arena = self._make_arena(nbytes)
        self._arenas.append(arena)
        return arena.slabs[self.rank][:nbytes].view(dtype)

    def common(self, numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A flat tensor in memory common to all ranks; call `barrier` between writing and reading. **Collective**.

        Returns:
            The common tensor, and a private (copy-on-write) view of it: a page that this rank writes there becomes its
            own, and later writes of other ranks to that page are not visible in it.
        """
        nbytes = numel * torch.empty(0, dtype=dtype).itemsize
        memory = self.common_memory(nbytes)
        return memory.shared[:nbytes].view(dtype), memory.private[:nbytes].view(dtype)

    def common_memory(self, nbytes: int) -> CommonMemory:
        """New memory common to all ranks, zeroed; it has no name and is freed with the last of them. **Collective**."""
        nbytes = max(nbytes, 1)
        self.barrier(tag_of("making common memory", nbytes))  # before files, which are no tags
        with contextlib.ExitStack() as cleanup:
            if self.rank == 0:
                segment = cleanup.enter_context(contextlib.closing(Segment(nbytes)))
                memory, descriptor = segment.buffer, segment.descriptor
                for peer in self._peers:
                    send_file(peer, descriptor)
            else:
                descriptor = cleanup.enter_context(receive_file(self._peers[0]))
                memory = mmap.mmap(descriptor, nbytes)
            own = mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY)
            self.barrier()  # no rank uses the segment before all have mapped it
        return CommonMemory(memory, own)

    def slabs(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's data for `tensor`, which `zeros` made on this channel, in rank order. Local."""
        arena = self._arena_of(tensor)
        assert arena is not None
        return arena.views(tensor)

    def free(self, tensor: torch.Tensor) -> None:
        """See `Channel.free`."""
        self._arenas = [arena for arena in self._arenas if arena.start != tensor.data_ptr()]

    @comm_timer.communicating()
    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        """See `Channel`; done on return."""
        tag = self._tag("all-reduce", tensor)
        for slabs in self.mapped(tensor):
            self._sum_(slabs, tag)
        return Done()

    def mapped(self, tensor: torch.Tensor) -> Iterator[list[torch.Tensor]]:
        """What the caller computes on memory that all ranks map: every rank's `tensor`, flat, in rank order. Local.

        A tensor that `zeros` made is there already; another one comes in chunks, each copied there and back.
        """
        arena = self._arena_of(tensor)
        if arena is not None:
            yield arena.views(tensor)
            return
        for chunk, staged in self._chunks(tensor):
            staged[self.rank].copy_(chunk)
            yield staged
            chunk.copy_(staged[self.rank])

    @comm_timer.communicating()
    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """See `Channel`; done on return."""
        tag = self._tag("broadcast", tensor)
        for chunk, staged in self._chunks(tensor):
            if self.rank == source:
                staged[source].copy_(chunk)
            self.barrier(tag)
            if self.rank != source:
                chunk.copy_(staged[source])
            self.barrier(tag)
        return Done()

    @comm_timer.communicating()
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `Channel`."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        flats = [other.view(-1) for other in gathered]
        start, tag = 0, self._tag("all-gather", tensor)
        for chunk, staged in self._chunks(tensor):
            staged[self.rank].copy_(chunk)
            self.barrier(tag)
            for flat, slab in zip(flats, staged, strict=True):
                flat[start : start + len(chunk)].copy_(slab)
            self.barrier(tag)
            start += len(chunk)
        return gathered

    @comm_timer.communicating()
    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Channel`."""
        rows, tag = tensor.view(self.size, -1), self._tag("reduce-scatter", tensor)
        total = torch.empty_like(rows[0])
        width = STAGING_BYTES // tensor.itemsize // self.size
        for start in range(0, len(total), width):
            chunk = rows[:, start : start + width]
            nbytes = chunk.numel() * tensor.itemsize
            slabs = [slab[:nbytes].view(tensor.dtype).view(self.size, -1) for slab in self._staging.slabs]
            slabs[self.rank].copy_(chunk)
            self.barrier(tag)
            part = total[start : start + width]
            torch.add(slabs[0][self.rank], slabs[1][self.rank], out=part)
            for slab in slabs[2:]:
                part.add_(slab[self.rank])
            self.barrier(tag)
        return total

    @comm_timer.communicating()
    def tree_all_reduce_(self, rows: torch.Tensor, tree: ReductionTree) -> None:
        """See `Channel`."""
        arena = self._arena_of(rows)
        if arena is None:
            super().tree_all_reduce_(rows, tree)
            return
        slabs, tag = [view.view(rows.shape) for view in arena.views(rows)], self._tag("all-reduce along a tree", rows)
        self.barrier(tag)
        part = self._part(rows.shape[1])
        if part.start < part.stop:
            total = tree.total([list(slab[:, part]) for slab in slabs], torch.Tensor.add_)
            for slab in slabs[1:]:
                slab[0, part].copy_(total)
        self.barrier(tag)

    def hang_up(self) -> None:
        """See `HierarchicalChannel.hang_up`."""
        shut_down(self._peers)

    def close(self) -> None:
        """See `Channel.close`."""
        for peer in self._peers:
            peer.close()
        self._arenas = []

    def _tag(self, kind: str, tensor: torch.Tensor) -> CollectiveTag:
        return tag_of(kind, tensor.nbytes, self.purpose)

    def _sum_(self, slabs: list[torch.Tensor], tag: CollectiveTag) -> None:
        self.barrier(tag)
        part = self._part(slabs[0].numel())
        if part.start < part.stop:
            total = slabs[0][part]
            for slab in slabs[1:]:
                total.add_(slab[part])
            for slab in slabs[1:]:
                slab[part].copy_(total)
        self.barrier(tag)

    def _part(self, length: int) -> slice:
        """The range that this rank sums."""
        return slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)

    def barrier(self, tag: CollectiveTag | None = None) -> None:
        """Wait until every rank has called. **Collective**.

        Args:
            tag: What for; by default a barrier for the channel's purpose.

        Raises:
            PlanError: Another rank is in another collective.
        """
        began_s, tag = time.perf_counter(), tag or tag_of("a barrier", 0, self.purpose)
        packed = tag.packed
        try:
            for pairs in self._exchanges:
                for receiver, _ in pairs:
                    receiver.sendall(packed)
                for _, sender in pairs:
                    if self._receive_tag(sender) != packed:
                        packed = _MIXED
            if packed == _MIXED:
                raise mismatch_error(dict(enumerate(self._exchange_texts(tag.text))))
        except (OSError, PeerLostError) as error:
            self.hang_up()  # a rank that waits for this one, and not for the lost one, has to know
            raise PeerLostError(f"a collective ended early, another rank is gone ({error}).") from error
        comm_timer.waiting += time.perf_counter() - began_s

    def _receive_tag(self, peer: socket.socket) -> bytes:
        """The packed tag of the peer's collective."""
        until_s, received = time.perf_counter() + self._spin_s, b""
        while not received and time.perf_counter() < until_s:
            with contextlib.suppress(BlockingIOError):
                received = peer.recv(TAG_BYTES, socket.MSG_DONTWAIT)
                break
        while len(received) < TAG_BYTES:
            more = peer.recv(TAG_BYTES - len(received))
            if not more:
                raise PeerLostError("its socket closed")
            received += more
        return received

    def _exchange_texts(self, text: str) -> list[str]:
        """The texts of all ranks, in rank order. **Collective**: if tags differ, each rank has seen another one."""
        sent = text.encode()
        for peer in self._peers:
            peer.sendall(len(sent).to_bytes(4, "little") + sent)
        texts = [
            receive_exactly(peer, int.from_bytes(receive_exactly(peer, 4), "little")).decode() for peer in self._peers
        ]
        texts.insert(self.rank, text)
        return texts

    def _arena_of(self, tensor: torch.Tensor) -> _Arena | None:
        address = tensor.data_ptr()
        return next((arena for arena in self._arenas if 0 <= address - arena.start < arena.nbytes), None)

    def _chunks(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Split a tensor into chunks that fit into the staging arena, each with the slabs' views for it."""
        flat = tensor.view(-1)
        for chunk in flat.split(STAGING_BYTES // flat.itemsize):
            yield chunk, [slab[: chunk.nbytes].view(chunk.dtype) for slab in self._staging.slabs]

    def _make_arena(self, nbytes: int) -> _Arena:
        """A slab for each rank. **Collective**."""
        pitch = -(-max(nbytes, 1) // _PAGE) * _PAGE
        slabs = list(self.common_memory(pitch * self.size).shared.split(pitch))
        return _Arena(slabs=slabs, start=slabs[self.rank].data_ptr(), nbytes=pitch)


def barrier_exchanges(size: int) -> list[range]:
    """For each round of a barrier, the distances from a rank to those after it that get its tag, modulo `size`.

    As far before it are those whose tags it gets. With a first distance d, it knows the tags of d - 1 of them already.
    """
    exchanges, known = [], 1
    while known < size:
        exchanges.append(range(known, min(known * _RADIX, size), known))
        known *= _RADIX
    return exchanges


def send_file(peer: socket.socket, descriptor: int) -> None:
    """Send a file descriptor, with one byte. Raises `PeerLostError` if the peer is gone."""
    try:
        socket.send_fds(peer, [b"\0"], [descriptor])
    except OSError as error:
        raise PeerLostError(f"memory could not be shared, another rank is gone ({error}).") from error


@contextlib.contextmanager
def receive_file(peer: socket.socket) -> Iterator[int]:
    """A file descriptor that the peer has sent with one byte, open for as long as the context.

    Raises:
        PeerLostError: The peer closes the connection first.
    """
    try:
        received, files, _, _ = socket.recv_fds(peer, 1, 1)
    except ConnectionError as error:
        raise PeerLostError(f"memory could not be shared, another rank is gone ({error}).") from error
    if not received or not files:
        raise PeerLostError("another rank is gone while ranks connect.")
    try:
        yield files[0]
    finally:
        os.close(files[0])

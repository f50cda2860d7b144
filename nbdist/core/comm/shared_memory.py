"""A channel through shared memory, for ranks on one host and tensors on the CPU.

Every rank has a slab of each arena, which all ranks map. To sum, each rank adds up its own part of all slabs, in rank
order, and writes the sum back into them. Bytes over Unix sockets, one between each two ranks, say that everybody has
arrived: waiting costs no processor time, is interrupted at once, and ends when a peer does, for then its socket closes.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import secrets
import select
import socket
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from nbdist.core.comm.channel import Channel, Done, Pending
from nbdist.core.comm.comm_timer import comm_timer
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.comm.rendezvous import echoes
from nbdist.core.transfer.payload import Segment
from nbdist.errors import PeerLostError
from nbdist.peer_auth import IntruderError, accept_proof, give_proof
from nbdist.peer_auth import receive_exactly as hear_exactly
from nbdist.plan import available_cores

__all__ = ["SPIN_S", "SharedMemoryChannel", "connect", "open_sockets", "receive_exactly", "receive_file"]

_PAGE = 4096
SPIN_S = 1e-4
"""How long to look for a peer before sleeping, where each rank has a core: to be woken takes 20 to 50 us more."""
_LOOK_S = 0.02
"""How often who waits for a peer to call looks whether the store is still there."""
_STAGING_BYTES = 1 << 20
"""Tensors that do not lie in an arena pass through one of this size, piece by piece."""


open_sockets: weakref.WeakSet[Any] = weakref.WeakSet()
"""Everything with a `close` that holds sockets to other ranks."""


def _close_in_fork() -> None:
    """A data-loading process that outlives its killed rank would hold the sockets open, and the peers would wait."""
    for holder in list(open_sockets):
        holder.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_fork)


@dataclass(frozen=True, kw_only=True)
class _Arena:
    """One slab a rank, as bytes.

    Args:
        slabs: ``(bytes,)`` of uint8 each, in rank order; `start` is the address of this rank's own.
    """

    slabs: list[torch.Tensor]
    start: int
    nbytes: int

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """For a tensor in this rank's slab, the same place in every slab, flat."""
        offset = tensor.data_ptr() - self.start
        return [slab[offset : offset + tensor.nbytes].view(tensor.dtype) for slab in self.slabs]


class SharedMemoryChannel(Channel):
    """Ranks of one host. **Collective**: all of them construct it.

    Args:
        rank: This rank.
        size: How many.
        store: Where they find each other.
        name: Unique to this channel among the users of `store`.
    """

    def __init__(self, rank: int, size: int, store: Any, name: str) -> None:
        super().__init__(rank, size, torch.device("cpu"))
        self._peers = connect(rank, size, store, name)
        open_sockets.add(self)
        self._spin_s = SPIN_S if size <= available_cores() else 0.0
        self._arenas: list[_Arena] = []
        try:
            self._staging = self._make_arena(_STAGING_BYTES)
        except BaseException:
            self.close()
            raise

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A tensor in shared memory, which is summed where it lies. **Collective**; see `Channel.zeros`."""
        nbytes = numel * torch.empty(0, dtype=dtype).itemsize
        arena = self._make_arena(nbytes)
        self._arenas.append(arena)
        return arena.slabs[self.rank][:nbytes].view(dtype)

    def common(self, numel: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """A flat tensor that is the same memory on every rank; `barrier` between writing and reading. **Collective**.

        Beside it that memory as this rank alone sees it: pages to which it writes there become its own, and it does
        not see any more what is written to them elsewhere.
        """
        nbytes = numel * torch.empty(0, dtype=dtype).itemsize
        common, own = (mapped[:nbytes].view(dtype) for mapped in self._map(max(nbytes, 1)))
        return common, own

    def slabs(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """What each rank has at the place of `tensor`, which `zeros` made here, in rank order. Local."""
        arena = self._arena_of(tensor)
        assert arena is not None
        return arena.views(tensor)

    def free(self, tensor: torch.Tensor) -> None:
        """See `Channel.free`."""
        self._arenas = [arena for arena in self._arenas if arena.start != tensor.data_ptr()]

    @comm_timer.communicating()
    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        """See `Channel`; done on return."""
        arena = self._arena_of(tensor)
        if arena is not None:
            self._sum_(arena.views(tensor))
            return Done()
        for piece, staged in self._pieces(tensor):
            staged[self.rank].copy_(piece)
            self._sum_(staged)
            piece.copy_(staged[self.rank])
        return Done()

    @comm_timer.communicating()
    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """See `Channel`; done on return."""
        for piece, staged in self._pieces(tensor):
            if self.rank == source:
                staged[source].copy_(piece)
            self.barrier()
            if self.rank != source:
                piece.copy_(staged[source])
            self.barrier()
        return Done()

    @comm_timer.communicating()
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `Channel`."""
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        flats = [other.view(-1) for other in gathered]
        start = 0
        for piece, staged in self._pieces(tensor):
            staged[self.rank].copy_(piece)
            self.barrier()
            for flat, slab in zip(flats, staged, strict=True):
                flat[start : start + len(piece)].copy_(slab)
            self.barrier()
            start += len(piece)
        return gathered

    @comm_timer.communicating()
    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Channel`."""
        rows = tensor.view(self.size, -1)
        total = torch.empty_like(rows[0])
        width = _STAGING_BYTES // tensor.itemsize // self.size
        for start in range(0, len(total), width):
            piece = rows[:, start : start + width]
            nbytes = piece.numel() * tensor.itemsize
            slabs = [slab[:nbytes].view(tensor.dtype).view(self.size, -1) for slab in self._staging.slabs]
            slabs[self.rank].copy_(piece)
            self.barrier()
            part = total[start : start + width]
            torch.add(slabs[0][self.rank], slabs[1][self.rank], out=part)
            for slab in slabs[2:]:
                part.add_(slab[self.rank])
            self.barrier()
        return total

    @comm_timer.communicating()
    def sum_in_order_(self, rows: torch.Tensor, order: ReductionTree) -> None:
        """See `Channel`."""
        arena = self._arena_of(rows)
        if arena is None:
            super().sum_in_order_(rows, order)
            return
        slabs = [view.view(rows.shape) for view in arena.views(rows)]
        self.barrier()
        part = self._part(rows.shape[1])
        if part.start < part.stop:
            total = order.total([list(slab[:, part]) for slab in slabs], torch.Tensor.add_)
            for slab in slabs[1:]:
                slab[0, part].copy_(total)
        self.barrier()

    def close(self) -> None:
        """Hang up, which releases peers that wait for this rank. Twice is fine."""
        for peer in self._peers:
            peer.close()
        self._arenas = []

    def _sum_(self, slabs: list[torch.Tensor]) -> None:
        self.barrier()
        part = self._part(slabs[0].numel())
        if part.start < part.stop:
            total = slabs[0][part]
            for slab in slabs[1:]:
                total.add_(slab[part])
            for slab in slabs[1:]:
                slab[part].copy_(total)
        self.barrier()

    def _part(self, length: int) -> slice:
        """What this rank sums."""
        return slice(self.rank * length // self.size, (self.rank + 1) * length // self.size)

    def barrier(self) -> None:
        """Wait until every rank is here. **Collective**."""
        began_s = time.perf_counter()
        try:
            for peer in self._peers:
                peer.sendall(b"\0")
            for peer in self._peers:
                if not self._hear(peer):
                    raise PeerLostError("a collective ended early, another rank is gone (its socket closed).")
        except OSError as error:
            raise PeerLostError(f"a collective ended early, another rank is gone ({error}).") from error
        comm_timer.idle += time.perf_counter() - began_s

    def _hear(self, peer: socket.socket) -> bytes:
        """Receive a byte, or nothing where the peer has gone."""
        until_s = time.perf_counter() + self._spin_s
        while time.perf_counter() < until_s:
            with contextlib.suppress(BlockingIOError):
                return peer.recv(1, socket.MSG_DONTWAIT)
        return peer.recv(1)

    def _arena_of(self, tensor: torch.Tensor) -> _Arena | None:
        address = tensor.data_ptr()
        return next((arena for arena in self._arenas if 0 <= address - arena.start < arena.nbytes), None)

    def _pieces(self, tensor: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Cut a tensor into pieces that fit into the staging arena, each with the slabs' views for it."""
        flat = tensor.view(-1)
        for piece in flat.split(_STAGING_BYTES // flat.itemsize):
            yield piece, [slab[: piece.nbytes].view(piece.dtype) for slab in self._staging.slabs]

    def _make_arena(self, nbytes: int) -> _Arena:
        """A slab for each rank. **Collective**."""
        pitch = -(-max(nbytes, 1) // _PAGE) * _PAGE
        slabs = list(self._map(pitch * self.size)[0].split(pitch))
        return _Arena(slabs=slabs, start=slabs[self.rank].data_ptr(), nbytes=pitch)

    def _map(self, nbytes: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Map one new segment on all ranks; it has no name and is gone with the last of them. **Collective**.

        Returns:
            What all see, and the same for this rank alone.
        """
        with contextlib.ExitStack() as cleanup:
            if self.rank == 0:
                segment = cleanup.enter_context(contextlib.closing(Segment(nbytes)))
                memory, descriptor = segment.buffer, segment.descriptor
                for peer in self._peers:
                    socket.send_fds(peer, [b"\0"], [descriptor])
            else:
                descriptor = cleanup.enter_context(receive_file(self._peers[0]))
                memory = mmap.mmap(descriptor, nbytes)
            own = mmap.mmap(descriptor, nbytes, access=mmap.ACCESS_COPY)
            self.barrier()  # all have mapped it
        return torch.frombuffer(memory, dtype=torch.uint8), torch.frombuffer(own, dtype=torch.uint8)


def connect(rank: int, size: int, store: Any, name: str) -> list[socket.socket]:
    """One socket to every other rank, in rank order. The listeners have no name in the file system. **Collective**.

    Each side makes sure that the other is this user's and knows the world's secret.

    Raises:
        PeerLostError: Another rank, or the store, is gone.
    """
    peers: dict[int, socket.socket] = {}
    about = f"{store.generation}/{name}"
    look = functools.partial(store.check, [])
    try:
        with echoes(), socket.socket(socket.AF_UNIX) as listener:
            address = f"\0nbdist-{secrets.token_hex(16)}"
            listener.bind(address)
            listener.listen(size)
            store.set(f"{name}/address/{rank}", address)
            for other in range(rank):
                there = store.get(f"{name}/address/{other}").decode()
                peers[other] = socket.socket(socket.AF_UNIX)
                peers[other].connect(there)
                give_proof(peers[other], store.secret, f"{about}/{other}", rank, look)
            while len(peers) < size - 1:
                while not select.select([listener], [], [], _LOOK_S)[0]:
                    look()
                peer, _ = listener.accept()
                try:
                    other = accept_proof(peer, store.secret, f"{about}/{rank}", look)
                except IntruderError:  # whoever else can see the address
                    peer.close()
                    continue
                except BaseException:
                    peer.close()
                    raise
                peers[other] = peer
    except BaseException:
        for peer in peers.values():
            peer.close()
        raise
    return [peers[other] for other in sorted(peers)]


@contextlib.contextmanager
def receive_file(peer: socket.socket) -> Iterator[int]:
    """A descriptor that the peer has sent with one byte, open for as long as the context.

    Raises:
        PeerLostError: The peer hangs up before.
    """
    told, files, _, _ = socket.recv_fds(peer, 1, 1)
    if not told or not files:
        raise PeerLostError("another rank is gone while the ranks meet.")
    try:
        yield files[0]
    finally:
        os.close(files[0])


def receive_exactly(peer: socket.socket, length: int) -> bytes:
    """Receive so many bytes. Raises `PeerLostError` where the peer hangs up before."""
    try:
        return hear_exactly(peer, length)
    except ConnectionError as error:
        raise PeerLostError(str(error)) from error

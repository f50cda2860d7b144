"""Collectives along one mesh axis (all-reduce, broadcast, all-gather, ...): the interface, and the one-rank channel."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch

from nbdist.core.comm.reduction_order import ReductionTree

__all__ = ["Channel", "Done", "Pending", "SoloChannel"]


class Pending(ABC):
    """Handle of an asynchronous collective."""

    @abstractmethod
    def wait(self) -> None:
        """Block until the result is in place; an interrupt lands at once.

        Raises:
            PeerLostError: Another rank is gone.
        """

    def wait_on_device(self) -> None:
        """Order later work on the device after the collective; with nccl this returns without blocking the host."""
        self.wait()


class Channel(ABC):
    """Collectives along one mesh axis. **Collective**: every rank of the axis makes the same calls in the same order.

    Args:
        rank: This rank's coordinate on the axis.
        size: The degree of the axis.
        device: Where tensors must lie.

    Attributes:
        purpose: What the next collectives are for, the same on all ranks; "" where their kind and size say enough.
        overlaps: Whether collectives on CPU tensors run beside the computation.
    """

    purpose = ""
    overlaps = False

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device

    @contextlib.contextmanager
    def used_for(self, purpose: str) -> Iterator[None]:
        """Context in which collectives have a purpose. Local."""
        before, self.purpose = self.purpose, purpose
        try:
            yield
        finally:
            self.purpose = before

    @abstractmethod
    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        """Begin to replace `tensor`, contiguous and of the same shape everywhere, by its sum over the axis.

        The sum has the same bits on every rank, and on CPU it is taken in rank order: ((t0 + t1) + t2) + ...
        """

    @abstractmethod
    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """Begin to replace `tensor`, contiguous, by the one of rank `source`."""

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A flat tensor that this channel reduces fastest; release it with `free`. **Collective**."""
        return torch.zeros(numel, dtype=dtype, device=self.device)

    def beside(self) -> Channel:
        """A channel over the same ranks whose sums run beside the computation, if that pays. **Collective**.

        It is closed with this one; by default it is this one.
        """
        return self

    def free(self, tensor: torch.Tensor) -> None:  # noqa: B027 - most channels keep nothing
        """Release a tensor that `zeros` made. Local."""

    def close(self) -> None:  # noqa: B027
        """Close: peers that wait for this rank get an error. Local, twice is fine."""

    def all_reduce_(self, tensor: torch.Tensor) -> None:
        """`start_all_reduce_` and wait for it."""
        self.start_all_reduce_(tensor).wait()

    def broadcast_(self, tensor: torch.Tensor, source: int = 0) -> None:
        """`start_broadcast_` and wait for it."""
        self.start_broadcast_(tensor, source).wait()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Copies of every rank's `tensor`, in rank order. It is contiguous and of the same shape everywhere."""
        gathered = [tensor.clone() if rank == self.rank else torch.empty_like(tensor) for rank in range(self.size)]
        for rank, part in enumerate(gathered):
            self.broadcast_(part, rank)
        return gathered

    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sum over the axis; `tensor` is flat, and its length a multiple of the degree."""
        total = tensor.clone()
        self.all_reduce_(total)
        return total.view(self.size, -1)[self.rank]

    def tree_all_reduce_(self, rows: torch.Tensor, tree: ReductionTree) -> None:
        """All-reduce in the order of a reduction tree: `rows[0]` becomes the sum; the other rows are overwritten.

        Args:
            rows: ``(tree.rows, n)``, contiguous: one row per tree node of ``tree.nodes[rank]``, already summed here.
            tree: Which row is added to which.
        """
        if self.size > 1:
            rows[0].copy_(tree.total([list(other) for other in self.all_gather(rows)], torch.Tensor.add_))
        else:
            assert tree.rows == 1

    def broadcast_any_(self, tensor: torch.Tensor, source: int = 0) -> None:
        """`broadcast_` of a tensor in any memory layout."""
        contiguous = tensor.contiguous()
        self.broadcast_(contiguous, source)
        if contiguous is not tensor:
            tensor.copy_(contiguous)

    def broadcast_bytes(self, data: bytes, source: int = 0) -> bytes:
        """Return the bytes of rank `source`; the other ranks' `data` is ignored."""
        device = self.device
        length = torch.tensor([len(data)], device=device)
        self.broadcast_(length, source)
        buffer = torch.zeros(int(length.item()), dtype=torch.uint8, device=device)
        if self.rank == source and data:
            buffer.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self.broadcast_(buffer, source)
        return buffer.cpu().numpy().tobytes()


class Done(Pending):
    """The handle of a collective that is already complete."""

    def wait(self) -> None:
        """Nothing to wait for."""


class SoloChannel(Channel):
    """The channel of an axis of degree 1: every collective is the identity."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(rank=0, size=1, device=device)

    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        """The sum over one rank."""
        return Done()

    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """Nothing to send: this rank is the only one."""
        return Done()

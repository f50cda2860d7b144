"""Collectives over a `torch.distributed` process group, gloo or nccl: polled, and on CPU summed in rank order."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from nbdist.core.comm.channel import Channel, Pending
from nbdist.core.comm.comm_timer import comm_timer
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.errors import PeerLostError

__all__ = ["ProcessGroupChannel", "Work"]

_GATHER_BELOW_BYTES = 256 * 1024
"""Below this, gathering every rank's tensor and adding locally is one message round instead of two (measured on
gloo: 2.0 against 3.8 ms at four ranks and 64 KiB, 87 against 22 ms at 10 MiB)."""
_SPINS = 50
_POLL_S = 5e-5


def _all_gather(output: torch.Tensor, tensor: torch.Tensor, group: Any) -> Any:
    # torch 2.13 renamed the collective and deprecated the old name.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(output, tensor, group=group, async_op=True)


def _reduce_scatter(output: torch.Tensor, tensor: torch.Tensor, group: Any) -> Any:
    scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return scatter(output, tensor, group=group, async_op=True)


class Work(Pending):
    """Polls torch's own work handle: its blocking `wait` would hold an interrupt back until torch's timeout."""

    def __init__(self, work: Any, then: Callable[[], Pending | None] | None, streamed: bool) -> None:
        self._work = work
        self._then = then
        self._streamed = streamed

    @classmethod
    def launch(
        cls, start: Callable[[], Any], then: Callable[[], Pending | None] | None = None, *, streamed: bool = False
    ) -> Work:
        """Start one of torch's collectives; `then` runs when it is done. `streamed`: nccl's, ordered by CUDA streams.

        Raises:
            PeerLostError: Another rank is gone.
        """
        try:
            return cls(start(), then, streamed)
        except RuntimeError as error:
            raise PeerLostError(f"a collective could not start, another rank is gone ({error}).") from error

    @property
    def done(self) -> bool:
        """Whether it has completed or failed."""
        return bool(self._work.is_completed())

    @comm_timer.communicating()
    def wait(self) -> None:
        """See `Pending`. Time waiting for other ranks counts as communication here: torch does not separate the two."""
        try:
            spins = 0
            while not self._work.is_completed():
                spins += 1
                time.sleep(0 if spins < _SPINS else _POLL_S)
            self._work.wait()
        except RuntimeError as error:
            raise PeerLostError(f"a collective ended early, another rank is gone ({error}).") from error
        following = self._then() if self._then else None
        if following:
            following.wait()

    def wait_on_device(self) -> None:
        """See `Pending`."""
        if self._streamed:
            self._work.wait()  # nccl's own: the current stream waits, this thread does not
        else:
            self.wait()


class ProcessGroupChannel(Channel):
    """A process group as a channel.

    It keeps no reference to the default group, and drops that to another group when it is closed: a live reference
    keeps a destroyed group's sockets open, and peers that wait on them would never get an error.

    Args:
        device: Where tensors must lie.
        streamed: Whether the backend is nccl.
        group: torch's group; None is the default group, of all ranks.
        ranks: The ranks of `group`, in order.
    """

    def __init__(
        self, device: torch.device, *, streamed: bool = False, group: Any = None, ranks: list[int] | None = None
    ) -> None:
        self._ranks = list(range(dist.get_world_size())) if ranks is None else ranks
        super().__init__(self._ranks.index(dist.get_rank()), len(self._ranks), device)
        self._streamed = streamed
        self._group = group

    def close(self) -> None:
        """See `Channel.close`; the world destroys the default group."""
        self._group = None

    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        """See `Channel`. On CPU the sum is in rank order; on a GPU in the backend's order, fixed for one topology."""
        group = self._group
        if tensor.device.type != "cpu":
            return Work.launch(lambda: dist.all_reduce(tensor, group=group, async_op=True), streamed=self._streamed)
        if tensor.nbytes <= _GATHER_BELOW_BYTES:
            return self._gather_and_add_(tensor)
        if self.size == 2:  # a + b == b + a: any order is rank order
            return Work.launch(lambda: dist.all_reduce(tensor, group=group, async_op=True))
        return self._scatter_add_gather_(tensor)

    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """See `Channel`."""
        ranks, group = self._ranks, self._group
        return Work.launch(lambda: dist.broadcast(tensor, src=ranks[source], group=group, async_op=True))

    @comm_timer.communicating()
    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """See `Channel`; as bytes, because gloo does not gather every dtype."""
        group = self._group
        gathered = tensor.new_empty((self.size, *tensor.shape))
        sent, received = tensor.view(-1).view(torch.uint8), gathered.view(-1).view(torch.uint8)
        self._finish(lambda: _all_gather(received, sent, group))
        return list(gathered)

    @comm_timer.communicating()
    def reduce_scatter(self, tensor: torch.Tensor) -> torch.Tensor:
        """See `Channel`. On CPU the sum is in rank order; on a GPU in the backend's order, fixed for one topology."""
        group = self._group
        if self._streamed:
            total = tensor.new_empty(tensor.numel() // self.size)
            self._finish(lambda: _reduce_scatter(total, tensor, group))
            return total
        parts = torch.empty_like(tensor)
        self._finish(lambda: dist.all_to_all_single(parts, tensor, group=group, async_op=True))
        rows = parts.view(self.size, -1)
        mine = rows[0]
        for other in rows[1:]:
            mine.add_(other)
        return mine.clone()  # so that the memory of the other ranks' parts is freed

    def _finish(self, start: Callable[[], Any]) -> None:
        Work.launch(start, streamed=self._streamed).wait_on_device()

    @comm_timer.communicating()
    def tree_all_reduce_(self, rows: torch.Tensor, tree: ReductionTree) -> None:
        """See `Channel`. Each rank sums a range of the columns, on a GPU too."""
        group, size, length = self._group, self.size, -(-rows.shape[1] // self.size)
        sent = rows.new_zeros((len(rows), length * size))
        sent[:, : rows.shape[1]] = rows
        sent = sent.view(len(rows), size, length).transpose(0, 1).contiguous()
        parts, total = torch.empty_like(sent), rows.new_empty(length * size)
        self._finish(lambda: dist.all_to_all_single(parts, sent, group=group, async_op=True))
        mine = tree.total([list(other) for other in parts], torch.Tensor.add_)
        self._finish(lambda: _all_gather(total, mine, group))
        rows[0].copy_(total[: rows.shape[1]])

    def _gather_and_add_(self, tensor: torch.Tensor) -> Pending:
        group = self._group
        gathered = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype)

        def add() -> None:
            torch.add(gathered[0], gathered[1], out=tensor)
            for other in gathered[2:]:
                tensor.add_(other)

        return Work.launch(lambda: _all_gather(gathered.view(-1), tensor.view(-1), group), add)

    def _scatter_add_gather_(self, tensor: torch.Tensor) -> Pending:
        group = self._group
        flat = tensor.view(-1)
        length = -(-flat.numel() // self.size)
        if flat.numel() == length * self.size:
            padded = flat
        else:
            padded = flat.new_zeros(length * self.size)
            padded[: flat.numel()] = flat
        parts = torch.empty_like(padded)

        def add_and_gather() -> Pending:
            rows = parts.view(self.size, length)
            mine = rows[0]
            for row in rows[1:]:
                mine.add_(row)
            return Work.launch(lambda: _all_gather(padded, mine, group), finish)

        def finish() -> None:
            if padded is not flat:
                flat.copy_(padded[: flat.numel()])

        return Work.launch(lambda: dist.all_to_all_single(parts, padded, group=group, async_op=True), add_and_gather)

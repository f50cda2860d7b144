"""Data parallelism on one host: replicas that share one copy of the weights, and each rank updates its part of it."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch

from nbdist.core.axes import Axes
from nbdist.core.channels import SharedMemoryChannel
from nbdist.core.gradient_sync import COUNTS, Signals, Totals, tail_dtype
from nbdist.core.params import copy_or_zero_, laid_out_like
from nbdist.core.strategies.base import Strategy
from nbdist.core.sum_order import SumOrder
from nbdist.core.task import Task
from nbdist.plan import Plan

__all__ = ["SharedWeights"]

_ALIGNMENT = 16  # elements: each parameter begins a cache line, as one of its own would


class SharedWeights(Strategy):
    """What `Replicate` does, to the same bits, where all ranks map the same memory.

    The trainable parameters lie in memory that all ranks read. Every parameter has an owner: the rank that sums its
    gradient, keeps its optimizer state and writes it. The others put their gradient of it into their slab, where the
    owner reads it. So the sum and the optimizer's work are split over the ranks, nobody copies weights, and N ranks
    need the memory of one copy.

    It takes an optimizer that treats each parameter by itself, as those of torch.optim do, and gradients that nobody
    needs as a whole, as clipping would.

    **Collective**: the constructor gives every rank the weights and buffers of rank 0.

    Args:
        task: See `Strategy`; its model lies on the CPU.
        plan: See `Strategy`.
        axes: See `Strategy`.
    """

    def __init__(self, task: Task, plan: Plan, axes: Axes) -> None:
        super().__init__(task, plan, axes)
        channel = axes.dp
        assert isinstance(channel, SharedMemoryChannel)
        self._channel = channel
        self._parameters = list(self.table.trainable.values())
        owners = _owners([parameter.numel() for parameter in self._parameters], channel.size)
        self.table.owners.update(zip(self.table.trainable, owners, strict=True))
        self._owned = [i for i, owner in enumerate(owners) if owner == channel.rank]
        self._foreign = [i for i, owner in enumerate(owners) if owner != channel.rank]
        self._arenas: list[torch.Tensor] = []
        self._order = SumOrder.chain(channel.size) if self.sums is None else self.sums.order
        # The places of each parameter's gradients in the slab of each rank: one for each node of the order.
        self._slabs: list[list[dict[int, torch.Tensor]]] = [
            [{} for _ in range(self._order.rows)] for _ in range(channel.size)
        ]
        with torch.no_grad():
            for name, tensor in self.table.tensors.items():
                if name not in self.table.trainable:
                    channel.broadcast_any_(tensor)
            dtypes = list(dict.fromkeys(parameter.dtype for parameter in self._parameters))
            for dtype in dtypes:
                self._lay_out(dtype)
        length = COUNTS + len(self._parameters) if self.sums is None else self.sums.told
        self._tail = channel.zeros(length, tail_dtype(dtypes))
        self._arenas.append(self._tail)
        channel.meet()  # rank 0's weights are in place

    def _lay_out(self, dtype: torch.dtype) -> None:
        """Move the parameters of a dtype into shared memory, and give their gradients places in the slabs."""
        members = [i for i, parameter in enumerate(self._parameters) if parameter.dtype is dtype]
        starts = list(itertools.accumulate((_aligned(self._parameters[i].numel()) for i in members), initial=0))
        weights, rows = self._channel.common(starts[-1], dtype), self._order.rows
        gradients = self._channel.zeros(rows * starts[-1], dtype)
        self._arenas.append(gradients)
        for i, start in zip(members, starts, strict=False):
            parameter = self._parameters[i]
            home = laid_out_like(parameter, weights, start)
            if self._channel.rank == 0:
                home.copy_(parameter)
            for places, slab in zip(self._slabs, self._channel.slabs(gradients), strict=True):
                for views, row in zip(places, slab.view(rows, starts[-1]), strict=True):
                    views[i] = laid_out_like(parameter, row, start)
            parameter.data = home

    def begin_step(self) -> None:
        """See `Strategy`."""
        self._channel.meet()  # all have read my slab, and written the weights they own
        if self.sums is not None:
            self.sums.begin()
            return
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def sync(self, weight: Any, signals: Signals, loss: tuple[Any, Any] = (0.0, 0.0)) -> Totals:
        """See `Strategy`. A rank then has gradients of what it owns only; an optimizer leaves alone what has none."""
        parameters, channel = self._parameters, self._channel
        if self.sums is None:
            nodes = [[parameter.grad for parameter in parameters]]
            used = [gradient is not None for gradient in nodes[0]]
            self._tail.copy_(torch.tensor([float(weight), *loss, *signals, *used], dtype=self._tail.dtype))
        else:
            nodes = self.sums.sums()
            self.sums.tell(signals, self._tail)
        for mine, gradients in zip(self._slabs[channel.rank], nodes, strict=False):
            copy_or_zero_([mine[i] for i in self._foreign], [gradients[i] for i in self._foreign])
        for i in self._foreign:
            parameters[i].grad = None
        channel.meet()  # everybody's gradients are in place

        first, *others = channel.slabs(self._tail)
        tail = functools.reduce(torch.add, others, first)
        if self.sums is None:
            totals, counts = Totals(tail[:COUNTS]), tail[COUNTS:].tolist() if not all(used) else [1.0] * len(used)
        else:
            totals, counts = self.sums.hear(tail)
        owned = [i for i in self._owned if counts[i]]
        if owned:
            sums = self._sums(owned, nodes)
            factor = totals.weight / self.plan.batch_size
            if factor not in (0.0, 1.0):
                torch._foreach_div_(sums, factor)
            for i, gradient in zip(owned, sums, strict=True):
                parameters[i].grad = gradient
        return totals

    def _sums(self, owned: list[int], nodes: list[list[torch.Tensor | None]]) -> list[torch.Tensor]:
        """The gradients of owned parameters, summed over all nodes in their order; made in place of the first."""
        parameters = self._parameters
        terms = [[[views[i] for i in owned] for views in places] for places in self._slabs]
        terms[self._channel.rank] = [
            [torch.zeros_like(parameters[i]) if (g := gradients[i]) is None else g for i in owned]
            for gradients in nodes
        ]
        return self._order.total(terms, _plus)

    def share_buffers(self) -> None:
        """See `Strategy`."""
        self._channel.meet()  # all have written the weights they own
        super().share_buffers()

    def close(self) -> None:
        """See `Strategy`."""
        super().close()
        for parameter in self._parameters:
            parameter.grad = None
            parameter.data = parameter.data.clone()
        for arena in self._arenas:
            self._channel.free(arena)


def _plus(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    torch._foreach_add_(left, right)
    return left


def _aligned(numel: int) -> int:
    return -(-numel // _ALIGNMENT) * _ALIGNMENT


def _owners(sizes: list[int], ranks: int) -> list[int]:
    """An owner for each size, so that ranks own about the same: the largest first, to whom owns least."""
    owners, loads = [0] * len(sizes), [0] * ranks
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        owners[i] = loads.index(min(loads))
        loads[owners[i]] += sizes[i]
    return owners

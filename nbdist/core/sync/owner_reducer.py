"""Gradient sync in shared memory: each parameter's gradient is summed by one rank, its owner, where it lies."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
from torch import nn

from nbdist.core.comm import SharedMemoryChannel
from nbdist.core.params.param_table import copy_or_zero_, view_like
from nbdist.core.sync.agreement import NO_FLAGS, ControlFlags
from nbdist.core.sync.gradient_reducer import GradientReducer
from nbdist.core.sync.slice_accumulator import SliceAccumulator
from nbdist.core.sync.step_tail import Totals, tail_dtype

__all__ = ["OwnerReducer", "aligned_starts"]

_ALIGNMENT = 16  # elements: each parameter begins a cache line, as a tensor with its own memory would


class OwnerReducer(GradientReducer):
    """`GradientReducer` that leaves each rank the gradients of the parameters it owns; the others become None.

    A rank puts its gradients of other ranks' parameters into its slab, where their owners read them. After `finish`,
    call `channel.barrier` before the next `begin`: only then have all owners read this rank's slab.

    Args:
        parameters: Trainable parameters.
        owners: The owner of each, a rank of `channel`.
        channel: See `GradientReducer`.
        accumulator: Accumulates this rank's slices.
        full_batch: See `GradientReducer`.
    """

    def __init__(
        self, parameters: list[nn.Parameter], owners: list[int], channel: SharedMemoryChannel,
        accumulator: SliceAccumulator, *, full_batch: float,
    ) -> None:  # fmt: skip
        super().__init__(channel, full_batch, each_slice=accumulator.each_slice)
        self._parameters = parameters
        self._memory = channel
        self._accumulator = accumulator
        self._owned = [i for i, owner in enumerate(owners) if owner == channel.rank]
        self._foreign = [i for i, owner in enumerate(owners) if owner != channel.rank]
        # Views for each parameter's gradients in the slab of each rank: one for each tree node that a rank sums.
        self._slabs: list[list[dict[int, torch.Tensor]]] = [
            [{} for _ in range(accumulator.tree.rows)] for _ in range(channel.size)
        ]
        self._arenas: list[torch.Tensor] = []
        dtypes = list(dict.fromkeys(parameter.dtype for parameter in parameters))
        for dtype in dtypes:
            self._lay_out([i for i, parameter in enumerate(parameters) if parameter.dtype is dtype], dtype)
        self._tail = channel.zeros(accumulator.tail.numel, tail_dtype(dtypes))
        self._arenas.append(self._tail)

    def _lay_out(self, members: list[int], dtype: torch.dtype) -> None:
        rows, starts = self._accumulator.tree.rows, aligned_starts(self._parameters[i].numel() for i in members)
        gradients = self._memory.zeros(rows * starts[-1], dtype)
        self._arenas.append(gradients)
        for places, slab in zip(self._slabs, self._memory.slabs(gradients), strict=True):
            for views, row in zip(places, slab.view(rows, starts[-1]), strict=True):
                views.update((i, view_like(self._parameters[i], row, s)) for i, s in zip(members, starts, strict=False))

    def zero_(self) -> None:
        """See `GradientReducer`."""
        self._accumulator.zero_()

    def add_slice(self, index: int) -> None:
        """See `GradientReducer`."""
        self._accumulator.add_slice(index)

    @torch.no_grad()
    def finish(self, flags: ControlFlags = NO_FLAGS) -> Totals:
        """See `GradientReducer`."""
        parameters = self._parameters
        nodes = self._accumulator.node_sums()
        self._accumulator.write_tail(self.losses, flags, self._tail)
        for mine, gradients in zip(self._slabs[self.channel.rank], nodes, strict=False):
            copy_or_zero_([mine[i] for i in self._foreign], [gradients[i] for i in self._foreign])
        for i in self._foreign:
            parameters[i].grad = None
        self._memory.barrier()  # the gradients of all ranks are in their slabs
        first, *others = self._memory.slabs(self._tail)
        totals, used = self._accumulator.read_tail(functools.reduce(torch.add, others, first))
        owned = sorted(set(used).intersection(self._owned))
        if owned:
            sums = self._sum_owned(owned, nodes)
            self.divide_(sums, totals)
            for i, gradient in zip(owned, sums, strict=True):
                parameters[i].grad = gradient
        return totals

    def _sum_owned(self, owned: list[int], nodes: list[list[torch.Tensor | None]]) -> list[torch.Tensor]:
        """The gradients of owned parameters, summed over all tree nodes in reduction order, in place of the first."""
        terms = [[[views[i] for i in owned] for views in places] for places in self._slabs]
        terms[self.channel.rank] = [
            [torch.zeros_like(self._parameters[i]) if (g := gradients[i]) is None else g for i in owned]
            for gradients in nodes
        ]
        return self._accumulator.tree.total(terms, _add)

    def close(self) -> None:
        """See `GradientReducer`."""
        for parameter in self._parameters:
            parameter.grad = None
        for arena in self._arenas:
            self.channel.free(arena)
        self._arenas, self._slabs = [], []


def aligned_starts(numels: Iterable[int]) -> list[int]:
    """Where parameters of these sizes begin in one flat tensor, and where the last one ends."""
    return list(itertools.accumulate((-(-numel // _ALIGNMENT) * _ALIGNMENT for numel in numels), initial=0))


def _add(left: list[torch.Tensor], right: list[torch.Tensor]) -> list[torch.Tensor]:
    torch._foreach_add_(left, right)
    return left

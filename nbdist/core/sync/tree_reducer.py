"""Deterministic gradient all-reduce: sums along a fixed tree, to the same bits on any number of ranks."""

from __future__ import annotations

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.params.param_table import copy_or_zero_, view_like
from nbdist.core.sync.agreement import NO_FLAGS, ControlFlags
from nbdist.core.sync.gradient_reducer import GradientReducer
from nbdist.core.sync.slice_accumulator import TreeAccumulator
from nbdist.core.sync.step_tail import Totals, tail_dtype

__all__ = ["TreeReducer"]


class TreeReducer(GradientReducer):
    """`GradientReducer` for slices whose gradients are summed in a fixed order.

    Args:
        parameters: Trainable parameters, on the channel's device.
        channel: See `GradientReducer`.
        accumulator: Accumulates this rank's slices.
        full_batch: See `GradientReducer`.
    """

    def __init__(
        self, parameters: list[nn.Parameter], channel: Channel, accumulator: TreeAccumulator, *, full_batch: float
    ) -> None:
        super().__init__(channel, full_batch, each_slice=True)
        self._parameters = parameters
        self._accumulator = accumulator
        self._flats: list[torch.Tensor] = []
        self._views: list[list[torch.Tensor]] = [[] for _ in parameters]  # by row: one for each tree node of a rank
        dtypes = list(dict.fromkeys(parameter.dtype for parameter in parameters))
        for dtype in dtypes:
            self._lay_out([i for i, parameter in enumerate(parameters) if parameter.dtype is dtype], dtype)
        self._tail = channel.zeros(accumulator.tail.numel, tail_dtype(dtypes))

    def _lay_out(self, members: list[int], dtype: torch.dtype) -> None:
        rows, length = self._accumulator.tree.rows, sum(self._parameters[i].numel() for i in members)
        flat = self.channel.zeros(rows * length, dtype).view(rows, length)
        self._flats.append(flat)
        start = 0
        for i in members:
            self._views[i] = [view_like(self._parameters[i], row, start) for row in flat]
            start += self._parameters[i].numel()

    def zero_(self) -> None:
        """See `GradientReducer`."""
        self._accumulator.zero_()

    def add_slice(self, index: int) -> None:
        """See `GradientReducer`."""
        self._accumulator.add_slice(index)

    @torch.no_grad()
    def finish(self, flags: ControlFlags = NO_FLAGS) -> Totals:
        """See `GradientReducer`."""
        nodes = self._accumulator.node_sums()
        self._accumulator.write_tail(self.losses, flags, self._tail)
        self.channel.all_reduce_(self._tail)
        totals, used = self._accumulator.read_tail(self._tail)
        for row, gradients in enumerate(nodes):
            copy_or_zero_([self._views[i][row] for i in used], [gradients[i] for i in used])
        for flat in self._flats:
            self.channel.tree_all_reduce_(flat, self._accumulator.tree)
        self.divide_([flat[0] for flat in self._flats], totals)
        for i in used:
            self._parameters[i].grad = self._views[i][0]
        return totals

    def close(self) -> None:
        """See `GradientReducer`."""
        for parameter in self._parameters:
            parameter.grad = None
        for flat in [*self._flats, self._tail]:
            self.channel.free(flat)
        self._flats, self._views = [], []
        self._tail = torch.empty(0)

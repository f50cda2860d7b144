"""Deterministic gradient all-reduce: sums along a fixed tree, to the same bits on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.params.param_table import copy_or_zero_, view_like
from nbdist.core.sync.gradient_sync import ControlFlags, Totals, tail_dtype
from nbdist.core.sync.slice_accumulator import SliceAccumulator

__all__ = ["DeterministicSync"]


class DeterministicSync:
    """`GradientSync` for slices whose gradients are summed in a fixed order.

    Args:
        parameters: Trainable parameters, on the channel's device.
        channel: The axis to sum over.
        accumulator: Accumulates this rank's slices.
        full_batch: See `GradientSync`.
    """

    def __init__(
        self, parameters: list[nn.Parameter], channel: Channel, accumulator: SliceAccumulator, *, full_batch: float
    ) -> None:
        self._parameters = parameters
        self._channel = channel
        self._accumulator = accumulator
        self._full_batch = full_batch
        self._flats: list[torch.Tensor] = []
        self._views: list[list[torch.Tensor]] = [[] for _ in parameters]  # by row: one for each tree node of a rank
        dtypes = list(dict.fromkeys(parameter.dtype for parameter in parameters))
        for dtype in dtypes:
            self._lay_out([i for i, parameter in enumerate(parameters) if parameter.dtype is dtype], dtype)
        self._tail = channel.zeros(accumulator.numel, tail_dtype(dtypes))

    def _lay_out(self, members: list[int], dtype: torch.dtype) -> None:
        rows, length = self._accumulator.tree.rows, sum(self._parameters[i].numel() for i in members)
        flat = self._channel.zeros(rows * length, dtype).view(rows, length)
        self._flats.append(flat)
        start = 0
        for i in members:
            self._views[i] = [view_like(self._parameters[i], row, start) for row in flat]
            start += self._parameters[i].numel()

    def zero_(self) -> None:
        """Clear all gradients at the start of a step. Local."""
        self._accumulator.begin_step()

    def arm(self) -> None:
        """Do nothing: the sum starts after the last slice. Local."""

    @torch.no_grad()
    def finish(self, weight: Any, flags: ControlFlags, *, loss: tuple[Any, Any]) -> Totals:
        """See `GradientSync.finish`; weight and loss are ignored, the accumulator has them. **Collective**."""
        del weight, loss
        nodes = self._accumulator.node_sums()
        self._accumulator.pack(flags, self._tail)
        self._channel.all_reduce_(self._tail)
        totals, counts = self._accumulator.unpack(self._tail)
        used = [i for i, count in enumerate(counts) if count]
        for row, gradients in enumerate(nodes):
            copy_or_zero_([self._views[i][row] for i in used], [gradients[i] for i in used])
        factor = totals.weight / self._full_batch
        for flat in self._flats:
            self._channel.tree_all_reduce_(flat, self._accumulator.tree)
            if factor not in (0.0, 1.0):
                flat[0].div_(factor)
        for i in used:
            self._parameters[i].grad = self._views[i][0]
        return totals

    def close(self) -> None:
        """Release the parameters: remove gradients and buffers. Local."""
        for parameter in self._parameters:
            parameter.grad = None
        for flat in [*self._flats, self._tail]:
            self._channel.free(flat)
        self._flats, self._views = [], []
        self._tail = torch.empty(0)

"""Gradient accumulation: the slices of one rank, added in place or along a tree with the same bits on any ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.reduction_order import Node, ReductionTree
from nbdist.core.sync.agreement import ControlFlags
from nbdist.core.sync.step_tail import LOSS_NUMBERS, StepLosses, StepTail, Totals

__all__ = ["PlainAccumulator", "SliceAccumulator", "TreeAccumulator"]

_COMPARED_NUMEL = 2**16
"""Largest buffer that is compared by value: F.batch_norm writes its buffers without changing `Tensor._version`."""
_Tensors = list[torch.Tensor | None]


class SliceAccumulator(ABC):
    """Adds up the gradients of this rank's slices in a step, and says in which order ranks add the sums.

    Attributes:
        tree: That order. A rank has a sum for each of its tree nodes.
        tail: The order of the tail's numbers.
        each_slice: Whether ranks exchange the losses slice by slice, and all add them in slice order.
    """

    tree: ReductionTree
    tail: StepTail
    each_slice: bool

    @abstractmethod
    def zero_(self) -> None:
        """Clear all gradients, at the start of a step. Local."""

    @abstractmethod
    def add_slice(self, index: int) -> None:
        """Call after the backward of a slice. Local."""

    @abstractmethod
    def node_sums(self) -> list[_Tensors]:
        """After this rank's last slice: the parameters' gradients, for each of its tree nodes. Local."""

    @abstractmethod
    def write_tail(self, losses: StepLosses, flags: ControlFlags, out: torch.Tensor) -> None:
        """Write this rank's tail, after `node_sums`. Local.

        Args:
            losses: Of its slices.
            flags: Its flags.
            out: ``(tail.numel,)``.
        """

    @abstractmethod
    def read_tail(self, summed: torch.Tensor) -> tuple[Totals, list[int]]:
        """The step's totals, and the indices of the parameters that any rank used. **Collective**."""


class PlainAccumulator(SliceAccumulator):
    """Backward accumulates in ``.grad``; ranks add in rank order.

    Args:
        parameters: Trainable parameters.
        channel: The data-parallel axis.
    """

    def __init__(self, parameters: list[nn.Parameter], channel: Channel) -> None:
        self.tree = ReductionTree.chain(channel.size)
        self.tail = StepTail(len(parameters))
        self.each_slice = False
        self._parameters = parameters
        self._used: list[bool] = []

    def zero_(self) -> None:
        """See `SliceAccumulator`."""
        for parameter in self._parameters:
            parameter.grad = None

    def add_slice(self, index: int) -> None:
        """See `SliceAccumulator`."""

    def node_sums(self) -> list[_Tensors]:
        """See `SliceAccumulator`."""
        gradients = [parameter.grad for parameter in self._parameters]
        self._used = [gradient is not None for gradient in gradients]
        return [gradients]

    def write_tail(self, losses: StepLosses, flags: ControlFlags, out: torch.Tensor) -> None:
        """See `SliceAccumulator`."""
        self.tail.write(out, losses.numbers, flags, self._used)

    def read_tail(self, summed: torch.Tensor) -> tuple[Totals, list[int]]:
        """See `SliceAccumulator`. Local."""
        counts = [1.0] * len(self._used) if all(self._used) else self.tail.used(summed)
        return self.tail.totals(summed), [i for i, count in enumerate(counts) if count]


class TreeAccumulator(SliceAccumulator):
    """Takes the gradients of one slice after another and sums them along a tree.

    Every slice starts from the buffers before the step, such as running statistics. After the step they have changed
    by the mean of all slices' changes.

    Args:
        parameters: Trainable parameters.
        buffers: The model's buffers.
        channel: The data-parallel axis.
        slices: Number of slices in a batch.
    """

    def __init__(
        self, parameters: list[nn.Parameter], buffers: list[torch.Tensor], channel: Channel, slices: int
    ) -> None:
        self.tree = ReductionTree.tree(slices, channel.size)
        self.tail = StepTail(len(parameters), rows=slices, buffers=len(buffers))
        self.each_slice = True
        self._parameters = parameters
        self._buffers = buffers
        self._channel = channel
        self._slices = self.tree.shares[channel.rank]
        self._nodes: list[tuple[Node, _Tensors]] = []
        self._next = self._slices.start
        self._change_counts = [0] * len(buffers)
        self._buffers_before: list[tuple[int, torch.Tensor]] = []  # buffers' versions and values

    def zero_(self) -> None:
        """See `SliceAccumulator`."""
        self._nodes, self._next = [], self._slices.start
        self._change_counts = [0] * len(self._buffers)
        known: list[Any] = self._buffers_before or [None] * len(self._buffers)
        self._buffers_before = [_values(buffer, before) for buffer, before in zip(self._buffers, known, strict=True)]
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def add_slice(self, index: int) -> None:
        """Add the gradients and buffer changes of a computed slice, and reset both. Local."""
        self._skip_to(index)
        found: _Tensors = []
        for parameter in self._parameters:
            gradient, parameter.grad = parameter.grad, None
            found.append(gradient if gradient is None or gradient.layout is torch.strided else gradient.to_dense())
        for i, (buffer, (version, before)) in enumerate(zip(self._buffers, self._buffers_before, strict=True)):
            change = None
            if _changed(buffer, version, before):
                self._change_counts[i] += 1
                change = torch.where(buffer == before, 0, _numbers(buffer) - _numbers(before))
                buffer.copy_(before)
                self._buffers_before[i] = buffer._version, before
            found.append(change)
        self._add(index, found)

    def _skip_to(self, index: int) -> None:
        """Add nothing for the slices without samples before `index`."""
        for empty in range(self._next, index):
            self._add(empty, [None] * (len(self._parameters) + len(self._buffers)))

    def _add(self, index: int, found: _Tensors) -> None:
        self.tree.add(self._nodes, (index, index + 1), found, _add_in_place)
        self._next = index + 1

    @torch.no_grad()
    def node_sums(self) -> list[_Tensors]:
        """See `SliceAccumulator`."""
        self._skip_to(self._slices.stop)
        return [found[: len(self._parameters)] for _, found in self._nodes]

    def write_tail(self, losses: StepLosses, flags: ControlFlags, out: torch.Tensor) -> None:
        """See `SliceAccumulator`. Each entry is zero on all ranks but one, or a count: sums have one result."""
        rows = [0.0] * (LOSS_NUMBERS * self.tree.terms)
        for index, loss, weight, units in losses.each:
            rows[LOSS_NUMBERS * index : LOSS_NUMBERS * (index + 1)] = float(units), float(loss), float(weight)
        used = [any(found[i] is not None for _, found in self._nodes) for i in range(len(self._parameters))]
        self.tail.write(out, rows, flags, used, self._change_counts)

    def read_tail(self, summed: torch.Tensor) -> tuple[Totals, list[int]]:
        """See `SliceAccumulator`. **Collective** if buffers have changed."""
        units, losses, weights = self.tail.losses(summed).double().unbind(1)
        loss = torch.where(weights == 0, 0.0, losses * weights).sum()
        changed = self.tail.buffers(summed)
        if any(changed):
            self._update_buffers(changed)
        totals = Totals(torch.cat([torch.stack([units.sum(), loss, weights.sum()]), self.tail.flags(summed).double()]))
        return totals, [i for i, count in enumerate(self.tail.used(summed)) if count]

    @torch.no_grad()
    def _update_buffers(self, counts: list[float]) -> None:
        """Set each changed buffer to its value before the step plus the mean of the changes. **Collective**.

        Integers change by integers: `num_batches_tracked` grows by one a step.
        """
        for i, count in enumerate(counts):
            if not count:
                continue
            buffer, before = self._buffers[i], _numbers(self._buffers_before[i][1])
            rows = before.new_zeros((self.tree.rows, before.numel()))
            for row, (_, found) in zip(rows, self._nodes, strict=False):
                if (change := found[len(self._parameters) + i]) is not None:
                    row.copy_(change.reshape(-1))
            self._channel.tree_all_reduce_(rows, self.tree)
            total = rows[0].view(before.shape)
            whole = not (before.is_floating_point() or before.is_complex())
            buffer.copy_(before + (total // int(count) if whole else total / count))


def _numbers(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.int() if buffer.dtype is torch.bool else buffer


def _changed(buffer: torch.Tensor, version: int, before: torch.Tensor) -> bool:
    return buffer._version != version or (buffer.numel() <= _COMPARED_NUMEL and not torch.equal(buffer, before))


def _values(buffer: torch.Tensor, known: tuple[int, torch.Tensor] | None) -> tuple[int, torch.Tensor]:
    """The version and a copy of a buffer; `known` again if it has not changed."""
    if known is not None and not _changed(buffer, *known):
        return known
    return buffer._version, buffer.detach().clone()


def _add_in_place(left: _Tensors, right: _Tensors) -> _Tensors:
    """Add right to left in place. A missing one is zero, and is added too, as between ranks: 0 + -0 is 0."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    if len(both) == len(left):
        return left
    return [
        (None if b is None else b.add_(0)) if a is None else (a if b is not None else a.add_(0))
        for a, b in zip(left, right, strict=True)
    ]

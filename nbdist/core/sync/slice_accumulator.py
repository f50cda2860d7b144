"""What a batch's slices add up to, to the same bits on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.reduction_order import Node, ReductionTree
from nbdist.core.sync.gradient_sync import ControlFlags, Totals

__all__ = ["SliceAccumulator"]

_UNTOLD = 2**16
"""Largest buffer that is looked at although autograd knows of no change: F.batch_norm changes its own unseen."""
_Tensors = list[torch.Tensor | None]


class SliceAccumulator:
    """Takes the gradients of one slice after the other and sums them in the order of a tree.

    Buffers that a slice changes, such as running statistics, it finds as they were before the step; afterwards they
    have changed by the mean of all slices' changes.

    Losses and weights, of which each slice has one, ranks tell each other slice by slice. They are added in the order
    of the slices by every rank.

    Args:
        parameters: Trainable parameters.
        buffers: Of the same model.
        channel: The ranks that share a batch.
        slices: Into how many a batch is cut.

    Attributes:
        units: How many a slice's gradient was given for each of its weight, see `Strategy.units`.
    """

    def __init__(
        self, parameters: list[nn.Parameter], buffers: list[torch.Tensor], channel: Channel, slices: int
    ) -> None:
        self.order = ReductionTree.tree(slices, channel.size)
        self._parameters = parameters
        self._buffers = buffers
        self._channel = channel
        self._share = self.order.shares[channel.rank]
        self._held: list[tuple[Node, _Tensors]] = []
        self._next = self._share.start
        self._measured: list[tuple[int, Any, Any]] = []
        self._moved = [0] * len(buffers)
        self._before: list[tuple[int, torch.Tensor]] = []  # buffers' versions and values
        self.units = 1.0

    @property
    def numel(self) -> int:
        """Length of what `tell` gives."""
        return 2 * self.order.terms + len(ControlFlags._fields) + len(self._parameters) + len(self._buffers)

    def begin(self) -> None:
        """A step begins. Local."""
        self._held, self._measured, self._next = [], [], self._share.start
        self._moved = [0] * len(self._buffers)
        known: list[Any] = self._before or [None] * len(self._buffers)
        self._before = [_values(buffer, before) for buffer, before in zip(self._buffers, known, strict=True)]
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def take(self, index: int, measured: tuple[torch.Tensor, Any] | None) -> None:
        """A slice has been computed. Its gradients are taken away. Local.

        Args:
            index: Which one.
            measured: Its loss and weight; None where it does not count.
        """
        self._pass_to(index)
        found: _Tensors = []
        for parameter in self._parameters:
            gradient, parameter.grad = parameter.grad, None
            found.append(gradient if gradient is None or gradient.layout is torch.strided else gradient.to_dense())
        for i, (buffer, (version, before)) in enumerate(zip(self._buffers, self._before, strict=True)):
            change = None
            if _changed(buffer, version, before):
                self._moved[i] += 1
                change = torch.where(buffer == before, 0, _numbers(buffer) - _numbers(before))
                buffer.copy_(before)
                self._before[i] = buffer._version, before
            found.append(change)
        self._add(index, found)
        if measured is not None:
            self._measured.append((index, *measured))

    def _pass_to(self, index: int) -> None:
        """Slices without samples have nothing to add."""
        for empty in range(self._next, index):
            self._add(empty, [None] * (len(self._parameters) + len(self._buffers)))

    def _add(self, index: int, found: _Tensors) -> None:
        self.order.add(self._held, (index, index + 1), found, _plus)
        self._next = index + 1

    @torch.no_grad()
    def sums(self) -> list[_Tensors]:
        """All slices of this rank are done: the parameters' gradients, for each node that it has summed. Local."""
        self._pass_to(self._share.stop)
        return [found[: len(self._parameters)] for _, found in self._held]

    def pack(self, flags: ControlFlags, out: torch.Tensor) -> None:
        """Write what is to be summed over the ranks, in any order: all but one have zeros, or it is a count. Local.

        Args:
            flags: What this rank says.
            out: ``(told,)``.
        """
        rows = [0.0] * (2 * self.order.terms)
        for index, loss, weight in self._measured:
            rows[2 * index : 2 * index + 2] = float(loss), float(weight)
        used = [any(found[i] is not None for _, found in self._held) for i in range(len(self._parameters))]
        out.copy_(torch.tensor([*rows, *flags, *used, *self._moved], dtype=out.dtype))

    def unpack(self, sums: torch.Tensor) -> tuple[Totals, list[float]]:
        """The step's totals, and by how many ranks each parameter was used. **Collective** where buffers have moved.

        Args:
            sums: What all have told, added up.
        """
        ends = 2 * self.order.terms, len(ControlFlags._fields), len(self._parameters), len(self._buffers)
        rows, flags, used, moved = sums.double().split(ends)
        losses, weights = rows.view(-1, 2).unbind(1)
        loss = torch.where(weights == 0, 0.0, losses * weights).sum()
        weight = weights.sum()
        counts = moved.tolist()
        if any(counts):
            self._move_buffers(counts)
        return Totals(torch.cat([torch.stack([weight * self.units, loss, weight]), flags])), used.tolist()

    @torch.no_grad()
    def _move_buffers(self, counts: list[float]) -> None:
        """Let each buffer that slices have changed have its value before, and the mean of the changes. **Collective**.

        Whole numbers move by whole numbers: what counts batches counts one a step.
        """
        for i, count in enumerate(counts):
            if not count:
                continue
            buffer, before = self._buffers[i], _numbers(self._before[i][1])
            rows = before.new_zeros((self.order.rows, before.numel()))
            for row, (_, found) in zip(rows, self._held, strict=False):
                if (change := found[len(self._parameters) + i]) is not None:
                    row.copy_(change.reshape(-1))
            self._channel.sum_in_order_(rows, self.order)
            total = rows[0].view(before.shape)
            whole = not (before.is_floating_point() or before.is_complex())
            buffer.copy_(before + (total // int(count) if whole else total / count))


def _numbers(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.int() if buffer.dtype is torch.bool else buffer


def _changed(buffer: torch.Tensor, version: int, before: torch.Tensor) -> bool:
    return buffer._version != version or (buffer.numel() <= _UNTOLD and not torch.equal(buffer, before))


def _values(buffer: torch.Tensor, known: tuple[int, torch.Tensor] | None) -> tuple[int, torch.Tensor]:
    """The version and values of a buffer; what is known already is not copied again."""
    if known is not None and not _changed(buffer, *known):
        return known
    return buffer._version, buffer.detach().clone()


def _plus(left: _Tensors, right: _Tensors) -> _Tensors:
    """Left and right, in place of left. What one of them lacks is zero, as in a sum of ranks: 0 + -0 is 0."""
    both = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
    if both:
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])
    if len(both) == len(left):
        return left
    return [
        (None if b is None else b.add_(0)) if a is None else (a if b is not None else a.add_(0))
        for a, b in zip(left, right, strict=True)
    ]

"""Deterministic gradient accumulation: sums a batch's slices to the same bits on any number of ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.comm.reduction_order import Node, ReductionTree
from nbdist.core.sync.gradient_sync import ControlFlags, Totals

__all__ = ["SliceAccumulator"]

_COMPARED_NUMEL = 2**16
"""Largest buffer that is compared by value: F.batch_norm writes its buffers without changing `Tensor._version`."""
_Tensors = list[torch.Tensor | None]


class SliceAccumulator:
    """Takes the gradients of one slice after another and sums them along a tree.

    Every slice starts from the buffers before the step, such as running statistics. After the step they have changed
    by the mean of all slices' changes.

    Ranks exchange losses and weights slice by slice, and every rank adds them in slice order.

    Args:
        parameters: Trainable parameters.
        buffers: The model's buffers.
        channel: The data-parallel axis.
        slices: Number of slices in a batch.

    Attributes:
        units: The factor from weights to units, see `Strategy.units`.
    """

    def __init__(
        self, parameters: list[nn.Parameter], buffers: list[torch.Tensor], channel: Channel, slices: int
    ) -> None:
        self.tree = ReductionTree.tree(slices, channel.size)
        self._parameters = parameters
        self._buffers = buffers
        self._channel = channel
        self._slices = self.tree.shares[channel.rank]
        self._nodes: list[tuple[Node, _Tensors]] = []
        self._next = self._slices.start
        self._losses: list[tuple[int, Any, Any]] = []
        self._change_counts = [0] * len(buffers)
        self._buffers_before: list[tuple[int, torch.Tensor]] = []  # buffers' versions and values
        self.units = 1.0

    @property
    def numel(self) -> int:
        """Length of what `pack` writes."""
        return 2 * self.tree.terms + len(ControlFlags._fields) + len(self._parameters) + len(self._buffers)

    def begin_step(self) -> None:
        """Start a step. Local."""
        self._nodes, self._losses, self._next = [], [], self._slices.start
        self._change_counts = [0] * len(self._buffers)
        known: list[Any] = self._buffers_before or [None] * len(self._buffers)
        self._buffers_before = [_values(buffer, before) for buffer, before in zip(self._buffers, known, strict=True)]
        for parameter in self._parameters:
            parameter.grad = None

    @torch.no_grad()
    def add_slice(self, index: int, loss_and_weight: tuple[torch.Tensor, Any] | None) -> None:
        """Add the gradients and buffer changes of a computed slice, and reset both. Local.

        Args:
            index: The slice.
            loss_and_weight: Its loss and weight; None if it does not count.
        """
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
        if loss_and_weight is not None:
            self._losses.append((index, *loss_and_weight))

    def _skip_to(self, index: int) -> None:
        """Add nothing for the slices without samples before `index`."""
        for empty in range(self._next, index):
            self._add(empty, [None] * (len(self._parameters) + len(self._buffers)))

    def _add(self, index: int, found: _Tensors) -> None:
        self.tree.add(self._nodes, (index, index + 1), found, _add_in_place)
        self._next = index + 1

    @torch.no_grad()
    def node_sums(self) -> list[_Tensors]:
        """After this rank's last slice: the parameters' gradients, for each tree node that it has summed. Local."""
        self._skip_to(self._slices.stop)
        return [found[: len(self._parameters)] for _, found in self._nodes]

    def pack(self, flags: ControlFlags, out: torch.Tensor) -> None:
        """Write what ranks all-reduce. Local.

        The reduction order does not matter: an entry is zero on all ranks but one, or a count.

        Args:
            flags: This rank's flags.
            out: ``(numel,)``.
        """
        rows = [0.0] * (2 * self.tree.terms)
        for index, loss, weight in self._losses:
            rows[2 * index : 2 * index + 2] = float(loss), float(weight)
        used = [any(found[i] is not None for _, found in self._nodes) for i in range(len(self._parameters))]
        out.copy_(torch.tensor([*rows, *flags, *used, *self._change_counts], dtype=out.dtype))

    def unpack(self, sums: torch.Tensor) -> tuple[Totals, list[float]]:
        """The step's totals, and how many ranks used each parameter. **Collective** if buffers have changed.

        Args:
            sums: ``(numel,)``, the sum of what all ranks packed.
        """
        ends = 2 * self.tree.terms, len(ControlFlags._fields), len(self._parameters), len(self._buffers)
        rows, flags, used, change_counts = sums.double().split(ends)
        losses, weights = rows.view(-1, 2).unbind(1)
        loss = torch.where(weights == 0, 0.0, losses * weights).sum()
        weight = weights.sum()
        counts = change_counts.tolist()
        if any(counts):
            self._update_buffers(counts)
        return Totals(torch.cat([torch.stack([weight * self.units, loss, weight]), flags])), used.tolist()

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

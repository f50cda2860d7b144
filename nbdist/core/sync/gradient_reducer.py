"""The gradient reducer: sums a step's gradients, and its tail, over the ranks of data parallelism (gradient sync)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from nbdist.core.comm import Channel
from nbdist.core.sync.agreement import NO_FLAGS, ControlFlags
from nbdist.core.sync.step_tail import StepLosses, Totals

__all__ = ["GradientReducer"]


class GradientReducer(ABC):
    """Sums ``weight / full_batch * d loss`` over the slices of all ranks, and divides by the sum of those factors.

    That is exact for uneven slices, and for means over tokens; a full batch of samples needs no division. Ranks sum the
    weights themselves: most are counts, whose sum has the same bits in any order.

    A step is `begin`; for each slice a backward and `add_slice`, its loss in `losses`; and `finish`.

    Args:
        channel: The axis to sum over.
        full_batch: The weight of a full global batch.
        each_slice: Whether ranks exchange losses slice by slice.

    Attributes:
        losses: The losses of this rank's slices in the step.
    """

    def __init__(self, channel: Channel, full_batch: float, *, each_slice: bool = False) -> None:
        self.channel = channel
        self.full_batch = full_batch
        self._each_slice = each_slice
        self.losses = StepLosses(channel.device)

    def begin(self) -> None:
        """Start a step. Local."""
        self.losses = StepLosses(self.channel.device)
        self.zero_()

    @abstractmethod
    def zero_(self) -> None:
        """Clear all gradients. Local."""

    def expect_last(self) -> None:  # noqa: B027 - only a reducer that overlaps with backward needs to know
        """Call before this rank's last backward of the step. Local."""

    def add_slice(self, index: int) -> None:  # noqa: B027 - backward accumulates by itself
        """Call after the backward of a slice, whether it counts or not. Local."""

    @abstractmethod
    def finish(self, flags: ControlFlags = NO_FLAGS) -> Totals:
        """End a step: turn every gradient into the weighted mean over all ranks. **Collective**.

        A parameter that no rank used gets no gradient, as in one process: no decay or momentum moves it.

        Args:
            flags: This rank's.
        """

    def counted_losses(self, totals: Totals) -> list[tuple[Any, Any]]:
        """The losses, with their weights, that this rank adds to the history for a finished step. Local."""
        if self._each_slice:  # the first rank adds that of the batch
            return [(totals.loss, totals.loss_weight)] if self.channel.rank == 0 and totals.weight else []
        return [(loss, weight) for _, loss, weight, _ in self.losses.each]

    @abstractmethod
    def close(self) -> None:
        """Release the parameters: remove hooks, gradients and buffers. Local."""

    def divide_(self, gradients: list[torch.Tensor], totals: Totals) -> None:
        """Divide sums by the total weight, unless it is that of a full batch. Local; waits for a GPU."""
        factor = totals.weight / self.full_batch
        if gradients and factor not in (0.0, 1.0):
            torch._foreach_div_(gradients, factor)

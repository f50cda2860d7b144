"""The gradient reducer of a single rank: gradients stay where backward allocates them, and nothing is summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.sync.agreement import NO_FLAGS, ControlFlags
from nbdist.core.sync.gradient_reducer import GradientReducer
from nbdist.core.sync.step_tail import StepTail, Totals

__all__ = ["SoloReducer"]


class SoloReducer(GradientReducer):
    """`GradientReducer` for one rank.

    Args:
        parameters: Trainable parameters, on the channel's device.
        channel: Of one rank.
        full_batch: See `GradientReducer`.
    """

    def __init__(self, parameters: list[nn.Parameter], channel: Channel, *, full_batch: float = 1.0) -> None:
        super().__init__(channel, full_batch)
        self._parameters = parameters
        self._tail = StepTail(0)
        self._sums = channel.zeros(self._tail.numel, torch.float64)

    def zero_(self) -> None:
        """See `GradientReducer`."""
        for parameter in self._parameters:
            parameter.grad = None

    def finish(self, flags: ControlFlags = NO_FLAGS) -> Totals:
        """See `GradientReducer`. Local."""
        for parameter in self._parameters:  # dense, as a sum over ranks is
            if parameter.grad is not None and parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        if self.channel.device.type == "cpu":
            totals = Totals([*map(float, self.losses.numbers), *flags])
            factor: Any = totals.weight / self.full_batch
        else:
            self._tail.write(self._sums, self.losses.numbers, flags, ())
            totals = self._tail.totals(self._sums)
            factor = self.losses.units / self.full_batch
            if isinstance(factor, torch.Tensor):  # reading it would wait for the GPU
                factor = torch.where(factor == 0, 1.0, factor)
        if isinstance(factor, torch.Tensor) or factor not in (0.0, 1.0):
            gradients = [p.grad for p in self._parameters if p.grad is not None]
            if gradients:
                torch._foreach_div_(gradients, factor)
        return totals

    def close(self) -> None:
        """See `GradientReducer`."""
        self.zero_()

"""Data parallelism: every rank holds the whole model and reads its part of the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbdist.core.channels import Channel
from nbdist.core.gradient_sync import GradientSync, Totals
from nbdist.core.params import ParamTable
from nbdist.core.strategies.base import Strategy

__all__ = ["Replicate"]


class Replicate(Strategy):
    """Replicas along one channel, kept equal by summing gradients. The module is not wrapped.

    **Collective**: the constructor gives every rank the weights and buffers of rank 0.

    Args:
        model: The module, on the channel's device.
        channel: The ``dp`` axis.
        full_batch: See `GradientSync`.
        bucket_mib: See `GradientSync`.
        overlap: See `GradientSync`.
    """

    def __init__(
        self, model: nn.Module, channel: Channel, *, full_batch: float = 1.0, bucket_mib: float = 25.0,
        overlap: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(ParamTable.of(model), channel, full_batch)
        with torch.no_grad():
            self.table.broadcast_(channel)
        trainable = list(self.table.trainable.values())
        self._gradients = GradientSync(
            trainable, channel, full_batch=full_batch, bucket_mib=bucket_mib, overlap=overlap
        )

    def begin_step(self) -> None:
        """See `Strategy`."""
        self._gradients.zero_()

    def backward(self, loss: torch.Tensor, weight: Any, *, last: bool) -> None:
        """See `Strategy`."""
        if last:
            self._gradients.arm()
        super().backward(loss, weight, last=last)

    def sync(self, weight: Any, *, stop: bool, exhausted: bool) -> Totals:
        """See `Strategy`."""
        return self._gradients.finish(weight, stop=stop, exhausted=exhausted)

    def close(self) -> None:
        """See `Strategy`."""
        self._gradients.close()

"""Data parallelism (as DDP): every rank holds the whole model and trains on its slices of each batch."""

from __future__ import annotations

from typing import Any

import torch

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.deterministic_sync import DeterministicSync
from nbdist.core.sync.gradient_sync import ControlFlags, GradientSync, Totals
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["DataParallel"]


class DataParallel(Strategy):
    """Replicas along one channel, kept equal by all-reducing gradients. The module is not wrapped.

    **Collective**: the constructor broadcasts the weights and buffers of rank 0.

    Args:
        task: See `Strategy`.
        plan: See `Strategy`.
        axes: See `Strategy`.
        overlap: See `GradientSync`.
    """

    def __init__(self, task: Task, plan: Plan, axes: MeshChannels, *, overlap: bool | None = None) -> None:
        super().__init__(task, plan, axes)
        self.table.broadcast_(axes.world)
        parameters = list(self.table.trainable.values())
        self._gradients: GradientSync | DeterministicSync = (
            GradientSync(parameters, axes.dp, full_batch=plan.batch_size, bucket_mib=plan.bucket_mib, overlap=overlap)
            if self.accumulator is None
            else DeterministicSync(parameters, axes.dp, self.accumulator, full_batch=plan.batch_size)
        )

    def begin_step(self) -> None:
        """See `Strategy`."""
        self._gradients.zero_()

    def backward(self, loss: torch.Tensor, weight: Any, *, last: bool) -> None:
        """See `Strategy`."""
        if last:
            self._gradients.arm()
        super().backward(loss, weight, last=last)

    def sync(self, weight: Any, flags: ControlFlags, loss: tuple[Any, Any] = (0.0, 0.0)) -> Totals:
        """See `Strategy`."""
        return self._gradients.finish(weight, flags, loss=loss)

    def close(self) -> None:
        """See `Strategy`."""
        super().close()
        self._gradients.close()
        self.axes.close()

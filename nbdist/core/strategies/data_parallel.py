"""Data parallelism (as DDP): every rank holds the whole model and trains on its slices of each batch."""

from __future__ import annotations

from torch import nn

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.strategies.rank_updates import RankUpdates
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.bucketed_reducer import BucketedReducer
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.sync.gradient_reducer import GradientReducer
from nbdist.core.sync.slice_accumulator import TreeAccumulator
from nbdist.core.sync.solo_reducer import SoloReducer
from nbdist.core.sync.tree_reducer import TreeReducer
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["OVERLAP_ABOVE", "DataParallel"]

OVERLAP_ABOVE = 8 << 20
"""Bytes of gradients from which on their sum over several hosts begins while backward still runs."""
_BESIDE_MIB = 4.0
"""Of a bucket there: the first one begins early, and the last, for which the step waits, is short."""


class DataParallel(Strategy):
    """Replicas along one channel, kept equal by all-reducing gradients. The module is not wrapped.

    **Collective**: the constructor broadcasts the weights and buffers of rank 0.

    Args:
        task: See `Strategy`.
        plan: See `Strategy`.
        axes: See `Strategy`.
        hooks: See `Strategy`.
        overlap: See `BucketedReducer`.
    """

    def __init__(
        self, task: Task, plan: Plan, axes: MeshChannels, hooks: GradientHooks | None = None, *,
        overlap: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(task, plan, axes, hooks)
        self.table.broadcast_(axes.world)
        self._overlap = overlap
        if task.updates:
            self.reducer = self._reducer([])  # for the tail of a step
            self.updates = RankUpdates(self, self._reducer)
        else:
            self.reducer = self._reducer(list(self.table.trainable.values()))

    def _reducer(self, parameters: list[nn.Parameter]) -> GradientReducer:
        plan, channel = self.plan, self.axes.dp
        if plan.reproducible:
            accumulator = TreeAccumulator(parameters, list(self.table.buffers.values()), channel, plan.slices)
            return TreeReducer(parameters, channel, accumulator, full_batch=plan.batch_size)
        if channel.size == 1:
            return SoloReducer(parameters, channel, full_batch=plan.batch_size)
        bucket_mib = plan.bucket_mib
        if self._overlap is None and sum(parameter.nbytes for parameter in parameters) > OVERLAP_ABOVE:
            channel = channel.beside()
            bucket_mib = min(bucket_mib, _BESIDE_MIB) if channel.overlaps else bucket_mib
        return BucketedReducer(
            parameters, channel, full_batch=plan.batch_size, bucket_mib=bucket_mib, overlap=self._overlap
        )

    def close(self) -> None:
        """See `Strategy`."""
        super().close()
        self.reducer.close()
        if self.updates is not None:
            self.updates.close()
        self.axes.close()

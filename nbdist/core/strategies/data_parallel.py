"""Data parallelism (as DDP): every rank holds the whole model and trains on its slices of each batch."""

from __future__ import annotations

from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.bucketed_reducer import BucketedReducer
from nbdist.core.sync.slice_accumulator import TreeAccumulator
from nbdist.core.sync.solo_reducer import SoloReducer
from nbdist.core.sync.tree_reducer import TreeReducer
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
        overlap: See `BucketedReducer`.
    """

    def __init__(self, task: Task, plan: Plan, axes: MeshChannels, *, overlap: bool | None = None) -> None:
        super().__init__(task, plan, axes)
        self.table.broadcast_(axes.world)
        parameters, channel, full_batch = list(self.table.trainable.values()), axes.dp, plan.batch_size
        if plan.reproducible:
            accumulator = TreeAccumulator(parameters, list(self.table.buffers.values()), channel, plan.slices)
            self.reducer = TreeReducer(parameters, channel, accumulator, full_batch=full_batch)
        elif channel.size == 1:
            self.reducer = SoloReducer(parameters, channel, full_batch=full_batch)
        else:
            self.reducer = BucketedReducer(
                parameters, channel, full_batch=full_batch, bucket_mib=plan.bucket_mib, overlap=overlap
            )

    def close(self) -> None:
        """See `Strategy`."""
        super().close()
        self.reducer.close()
        self.axes.close()

"""How a plan is applied to a module. This is the only place that chooses."""

from __future__ import annotations

import torch

from nbdist.core.comm import SharedMemoryChannel
from nbdist.core.comm.mesh_channels import MeshChannels
from nbdist.core.comm.world import World
from nbdist.core.optim.optimizers import OPTIMIZERS
from nbdist.core.strategies.data_parallel import DataParallel
from nbdist.core.strategies.mesh_parallel import MeshParallel
from nbdist.core.strategies.shared_weights import SharedWeights
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["SHARED_ABOVE", "apply"]

SHARED_ABOVE = 100_000
"""Trainable parameters, below which waiting for another rank's share of the update costs more than it saves."""


def apply(task: Task, plan: Plan, world: World) -> Strategy:
    """Make the strategy for `plan.mesh`. **Collective** over the world."""
    strategy = _chosen(task, plan, MeshChannels(world, plan.mesh), world)
    if strategy.batch_norms is not None:
        strategy.batch_norms.install()
    return strategy


def _chosen(task: Task, plan: Plan, axes: MeshChannels, world: World) -> Strategy:
    if plan.mesh.size > plan.mesh.dp:
        return MeshParallel(task, plan, axes, world)
    if isinstance(axes.dp, SharedMemoryChannel) and _divisible(task, plan):
        return SharedWeights(task, plan, axes)
    return DataParallel(task, plan, axes)


def _divisible(task: Task, plan: Plan) -> bool:
    """Whether the update may be split by parameters: nobody wants gradients or state as a whole, and it pays."""
    trainable = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    return (
        plan.clip_norm is None
        and plan.precision != "fp16"
        and not task.own_optimizer
        and type(task.optimizer) in OPTIMIZERS.values()
        and all(type(parameter.data) is torch.Tensor for parameter in trainable)
        and not any(getattr(module, "max_norm", None) for module in task.model.modules())  # it writes in its forward
        and sum(parameter.numel() for parameter in trainable) >= SHARED_ABOVE
    )

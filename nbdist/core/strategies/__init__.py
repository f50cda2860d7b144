"""How a plan is applied to a module. This is the only place that chooses."""

from __future__ import annotations

import torch

from nbdist.core.channels import SharedMemoryChannel
from nbdist.core.optimizers import OPTIMIZERS
from nbdist.core.strategies.base import Strategy
from nbdist.core.strategies.replicate import Replicate
from nbdist.core.strategies.shared_weights import SharedWeights
from nbdist.core.task import Task
from nbdist.core.world import World
from nbdist.plan import Plan

__all__ = ["SHARED_ABOVE", "Replicate", "SharedWeights", "Strategy", "apply"]

SHARED_ABOVE = 100_000
"""Trainable parameters, below which waiting for another rank's share of the update costs more than it saves."""


def apply(task: Task, plan: Plan, world: World) -> Strategy:
    """Make the strategy for `plan.mesh`. **Collective** over the world."""
    channel = world.channel()
    if isinstance(channel, SharedMemoryChannel) and _divisible(task, plan):
        return SharedWeights(task.model, channel, full_batch=plan.batch_size)
    return Replicate(task.model, channel, full_batch=plan.batch_size, bucket_mib=plan.bucket_mib)


def _divisible(task: Task, plan: Plan) -> bool:
    """Whether the update may be split by parameters: nobody wants gradients or state as a whole, and it pays."""
    trainable = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    return (
        plan.clip_norm is None
        and not task.own_optimizer
        and type(task.optimizer) in OPTIMIZERS.values()
        and all(type(parameter.data) is torch.Tensor for parameter in trainable)
        and not any(getattr(module, "max_norm", None) for module in task.model.modules())  # it writes in its forward
        and sum(parameter.numel() for parameter in trainable) >= SHARED_ABOVE
    )

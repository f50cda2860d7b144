"""Chooses the strategy for a plan: mesh parallel, shared weights or data parallel. No other module chooses."""

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
from nbdist.core.sync.gradient_hooks import GradientHooks
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["SHARED_ABOVE", "apply"]

SHARED_ABOVE = 100_000
"""Number of trainable parameter elements from which splitting the update over ranks saves more than the wait costs."""


def apply(task: Task, plan: Plan, world: World, hooks: GradientHooks | None = None) -> Strategy:
    """Create the strategy for `plan.mesh`. **Collective** over the world.

    Args:
        task: What is trained.
        plan: How.
        world: All ranks.
        hooks: The user's gradient hooks, if it trains.
    """
    strategy = _make_strategy(task, plan, MeshChannels(world, plan.mesh), world, hooks)
    if strategy.batch_norms is not None:
        strategy.batch_norms.install()
    return strategy


def _make_strategy(task: Task, plan: Plan, axes: MeshChannels, world: World, hooks: GradientHooks | None) -> Strategy:
    if plan.mesh.size > plan.mesh.dp:
        return MeshParallel(task, plan, axes, world, hooks)
    if isinstance(axes.dp, SharedMemoryChannel) and _can_split_update(task, plan):
        return SharedWeights(task, plan, axes, hooks)
    return DataParallel(task, plan, axes, hooks)


def _can_split_update(task: Task, plan: Plan) -> bool:
    """Whether each rank may update its own parameters: nothing needs all gradients or optimizer state, and it pays."""
    trainable = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    return (
        plan.clip_norm is None
        and plan.precision != "fp16"
        and not task.own_optimizers
        and task.after_step is None  # it would write to weights of others
        and not task.updates  # owners would have to wait for each other at each
        and all(type(optimizer) in OPTIMIZERS.values() for optimizer in task.optimizers.values())
        and all(type(parameter.data) is torch.Tensor for parameter in trainable)
        # An embedding with max_norm writes to its weight in forward.
        and not any(getattr(module, "max_norm", None) for module in task.model.modules())
        and sum(parameter.numel() for parameter in trainable) >= SHARED_ABOVE
    )

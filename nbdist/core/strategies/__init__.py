"""How a plan is applied to a module. This is the only place that chooses."""

from __future__ import annotations

from torch import nn

from nbdist.core.strategies.base import Strategy
from nbdist.core.strategies.replicate import Replicate
from nbdist.core.world import World
from nbdist.plan import Plan

__all__ = ["Replicate", "Strategy", "apply"]


def apply(model: nn.Module, plan: Plan, world: World) -> Strategy:
    """Make the strategy for `plan.mesh`. **Collective** over the world."""
    return Replicate(model, world.channel(), full_batch=plan.batch_size, bucket_mib=plan.bucket_mib)

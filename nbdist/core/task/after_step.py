"""A user's function that is called after each optimizer step: it may clamp, normalise or quantise weights."""

from __future__ import annotations

import torch

from nbdist.core.process import rng
from nbdist.core.task.task import Task
from nbdist.plan import Plan

__all__ = ["AfterStep"]


class AfterStep:
    """``after_step(model)`` of a task, or nothing.

    Every rank calls it, with the same weights and the same random numbers, so that its copy of the model stays equal.

    Args:
        task: Its `after_step`.
        plan: Its seed.
        device: Of the model.
    """

    def __init__(self, task: Task, plan: Plan, device: torch.device) -> None:
        self._function, self._given = task.after_step, task.given
        self._seed, self._device = plan.seed, device

    def call(self, step: int) -> None:
        """Call it, without gradients. Local."""
        if self._function is None:
            return
        with torch.no_grad(), rng.fork_rng(self._device):
            seed = rng.derive(self._seed, "after", step)
            rng.seed_all(seed)
            rng.seed_torch(seed, self._device)
            self._function(self._given)

"""The device of a task: its model and its optimizers' state are moved to the rank's, and back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nbdist.core.optim.state import move_state_
from nbdist.core.task.task import Task

__all__ = ["on_device"]


@contextlib.contextmanager
def on_device(task: Task, device: torch.device) -> Iterator[None]:
    """Move the model and its optimizers' state to a device within the context. Local."""
    first = next(task.model.parameters(), None)
    before = device if first is None else first.device
    _move(task, before, device)
    try:
        yield
    finally:
        _move(task, device, before)


def _move(task: Task, source: torch.device, target: torch.device) -> None:
    if source == target:
        return
    task.model.to(target)
    for optimizer in task.optimizers.values():
        move_state_(optimizer)

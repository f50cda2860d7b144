"""The step's one call of the model: caught, or answered by something else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from nbdist.core.task.task import Task
from nbdist.errors import TaskError

__all__ = ["call_of", "forward_replaced"]


class _Called(BaseException):
    """Ends a step at its call of the model; no `except Exception` of the user's stops it."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_given = args
        self.kwargs_given = kwargs


@contextlib.contextmanager
def forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a call of `model` run another forward; everything else about it stays. Local."""
    own = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            vars(model).pop("forward", None)
        else:
            vars(model)["forward"] = own


def call_of(task: Task, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What the step calls the model with; the rest of the step is not run. Local.

    Raises:
        TaskError: It does not call it.
    """

    def caught(*args: Any, **kwargs: Any) -> None:
        raise _Called(args, kwargs)

    try:
        with forward_replaced(task.model, caught):
            task.step(task.model, batch)
    except _Called as call:
        return call.args_given, call.kwargs_given
    raise TaskError(
        "the step never called model(...): on a mesh that cuts the model, it has to, for that is what is cut."
    )

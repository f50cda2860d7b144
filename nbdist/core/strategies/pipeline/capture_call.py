"""The step's one call of the model: capture its arguments, or replace the model's forward.

A pipeline's first stage needs the arguments; its last stage returns the output of the stages in place of the model's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from nbdist.core.params.func_transforms import check_no_transform
from nbdist.errors import TaskError

__all__ = ["capture_call", "forward_replaced"]


class _ModelCalled(BaseException):
    """Ends a step at its call of the model. A BaseException, so that the user's `except Exception` lets it pass."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.args_given = args
        self.kwargs_given = kwargs


@contextlib.contextmanager
def forward_replaced(model: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Context in which a call of `model` runs another forward, with the model's hooks as usual. Local."""
    own = vars(model).get("forward")
    vars(model)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            vars(model).pop("forward", None)
        else:
            vars(model)["forward"] = own


def capture_call(model: nn.Module, step: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with which a step calls the model; the rest of the step is not run. Local.

    Args:
        model: The model.
        step: The step, or whatever else calls the model, on some batch.

    Raises:
        TaskError: It does not call the model.
    """

    def raise_call(*args: Any, **kwargs: Any) -> None:
        check_no_transform()
        raise _ModelCalled(args, kwargs)

    try:
        with forward_replaced(model, raise_call):
            step()
    except _ModelCalled as call:
        return call.args_given, call.kwargs_given
    raise TaskError(
        "the step never called model(...): on a mesh with pp, tp or shard it has to: that call is what is split."
    )

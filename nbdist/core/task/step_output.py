"""What a step has returned: the loss, its weight, and the log; and what it should have returned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nbdist.core.sync.step_log import LOG_HOW
from nbdist.errors import TaskError

__all__ = ["no_scalar", "parts_of", "weight_of"]


def parts_of(returned: Any) -> tuple[Any, Any, Mapping[Any, Any] | None]:
    """Loss, weight and log in what a step has returned; None for what is not there."""
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        return returned, None, None
    if len(returned) == 2 and isinstance(returned[1], Mapping):
        return returned[0], None, returned[1]
    loss, weight, log = (*returned, None)[:3]
    if not (log is None or isinstance(log, Mapping)):
        kind = type(log).__name__
        raise TaskError(f"the step's log is a value of type {kind}: {LOG_HOW}; or call it by another name.")
    return loss, weight, log


def no_scalar(loss: Any) -> str:
    """What a step has returned in place of a scalar tensor, and the cure."""
    if isinstance(loss, torch.Tensor):
        return f"a tensor of shape {tuple(loss.shape)}" + (": end it with .mean()" if loss.numel() > 1 else "")
    if loss is None:
        return "None: end the step with `return loss`, or call nbdist.update(loss, optimizer) for each of several"
    if isinstance(loss, (int, float)):
        return f"a {type(loss).__name__}: return the tensor itself, without .item() or float()"
    if isinstance(loss, Mapping) or hasattr(loss, "loss"):
        return f"a {type(loss).__name__}: return the loss in it"
    return repr(type(loss))


def weight_of(given: Any, samples: int) -> Any:
    """A slice's weight as a number, or on a GPU as a scalar tensor in float64; by default its number of samples."""
    if given is None:
        return samples
    if not isinstance(given, torch.Tensor):
        return given
    return given.item() if given.device.type == "cpu" else given.double()  # reading it would wait for the GPU

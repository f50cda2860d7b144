"""What a metric returned, as numbers by name for the history."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import torch

from nbdist.errors import TaskError

__all__ = ["as_values"]

_MOST = 256
"""Numbers of one value: more would not fit into the state that each rank publishes."""


def as_values(value: Any, name: str) -> dict[str, Any]:
    """``val_<name>``; of a dict a value for each key, ``val_<key>``, and of dicts in it ``val_<key>_<key>``.

    Args:
        value: A number, a tensor or array, or a list of numbers; or a dict of them.
        name: The metric's.

    Raises:
        TaskError: It is something else, or too many numbers.
    """
    if not isinstance(value, Mapping):
        return {f"val_{name}": _numbers(value, name)}
    values: dict[str, Any] = {}
    for key, one in value.items():
        called = f"{name}_{key}" if str(key) == "loss" else str(key)  # val_loss is the validation loss
        if isinstance(one, Mapping):  # as of a report with a dict for each class
            inner = as_values(one, called)
            values |= {f"val_{called}_{of_one.removeprefix('val_')}": number for of_one, number in inner.items()}
        else:
            values |= as_values(one, called)
    if not values:
        raise TaskError(f"metric {name} returned an empty dict: return a number, or a dict of numbers.")
    return values


def _numbers(value: Any, name: str) -> Any:
    """A float, or nested lists of numbers."""
    numbers = value
    if isinstance(value, torch.Tensor):
        numbers = value.detach().cpu()
        numbers = numbers.item() if numbers.numel() == 1 else numbers.tolist()
    elif isinstance(value, (np.ndarray, np.generic)):
        numbers = value.item() if value.size == 1 else value.tolist()
    if isinstance(numbers, Real):
        return float(numbers)
    if type(numbers) in (list, tuple) and numbers:
        found = [_numbers(one, name) for one in numbers] if type(value) in (list, tuple) else numbers
        count = _count(found)
        if count > _MOST:
            raise TaskError(
                f"metric {name} returned {count} numbers, and a history keeps {_MOST} at most: return fewer, or "
                "compute it from the outputs that predict returns."
            )
        return found
    kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
    raise TaskError(f"metric {name} returned {kind}: return a number, (mean, weight), or a dict of numbers.")


def _count(numbers: Any) -> int:
    if isinstance(numbers, list):
        return sum(map(_count, numbers))
    return 1

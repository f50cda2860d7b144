"""A metric that is an object with `update` and `compute`: updated on one rank by whole batches, as in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from nbdist.core.task.metrics import named_errors

__all__ = ["UpdatedMetric", "follows_device"]


class UpdatedMetric:
    """A copy of such an object, for one evaluation. Local, on the gathering rank.

    Args:
        given: The user's object, which stays as it is.
        name: What it is called.
        device: Of the data, to which it follows if it can.
    """

    def __init__(self, given: Any, name: str, device: torch.device) -> None:
        self._name = name
        with named_errors(name):
            self._metric = copy.deepcopy(given)
            if callable(getattr(self._metric, "reset", None)):
                self._metric.reset()
            if follows_device(given):
                moved = self._metric.to(device)
                self._metric = self._metric if moved is None else moved

    def update(self, function: Callable[[Any], None]) -> None:
        """Call a function that updates the copy."""
        with named_errors(self._name):
            function(self._metric)

    def compute(self) -> Any:
        """What it computes."""
        with named_errors(self._name):
            return self._metric.compute()


def follows_device(given: Any) -> bool:
    """Whether an object can be moved to a device, in torch's own way."""
    return callable(getattr(type(given), "to", None))

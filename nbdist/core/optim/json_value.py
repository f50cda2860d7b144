"""Values of an optimizer or a scheduler as JSON, for checkpoints."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nbdist.errors import TaskError

__all__ = ["plain"]


def plain(value: Any, what: str) -> Any:
    """A value as JSON-able data; tuples become lists.

    Raises:
        TaskError: JSON cannot represent it.
    """
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()  # a learning rate in a tensor, for one
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [plain(item, what) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: plain(item, what) for key, item in value.items()}
    raise TaskError(
        f"{what} is a {type(value).__name__}, which a checkpoint cannot hold: it takes numbers, strings, and lists "
        "and dicts of them."
    )

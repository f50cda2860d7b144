"""Values of an optimizer or a scheduler as JSON: what a checkpoint holds beside tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from nbdist.errors import TaskError

__all__ = ["plain"]


def plain(value: Any, what: str) -> Any:
    """A value as JSON gives it back, but for tuples, which become lists.

    Raises:
        TaskError: It would come back as something else.
    """
    if isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and value.numel() == 1):
        value = value.item()  # a learning rate that lives in a tensor
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

"""An optimizer's references to tensors of the model, in what is kept as JSON: by name, and never as their values."""

from __future__ import annotations

import functools
from typing import Any

import torch

from nbdist.core.optim.json_value import plain
from nbdist.core.params.placeholder import detached
from nbdist.errors import TaskError

__all__ = ["TensorReferences", "is_name"]

_NAME = "|tensor"


class TensorReferences:
    """Tells of values that may be, or contain, tensors of the model.

    Args:
        tensors: The model's own parameters and buffers, by name.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def refers(self, value: Any) -> bool:
        """Whether a value is a tensor of the model, or lies in the memory of one."""
        if id(value) in self._names:
            return True
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return False
        return _memory(value) in self._memories

    @functools.cached_property
    def _memories(self) -> set[int]:
        return {_memory(tensor) for tensor in self._tensors.values() if tensor.layout is torch.strided} - {0}

    def to_json(self, value: Any, what: str) -> Any:
        """A value as `plain` has it, but with the names of the model's tensors.

        Raises:
            TaskError: It would come back as something else.
        """
        if id(value) in self._names:
            return {_NAME: self._names[id(value)]}
        if isinstance(value, (list, tuple)):
            return [self.to_json(item, what) for item in value]
        if isinstance(value, dict) and all(isinstance(key, str) and key != _NAME for key in value):
            return {key: self.to_json(item, what) for key, item in value.items()}
        if isinstance(value, torch.Tensor) and value.numel() == 1 and self.refers(value):
            raise TaskError(f"{what} lies in the memory of a tensor of the model, which a checkpoint cannot hold.")
        return plain(value, what)

    def from_json(self, here: Any, told: Any) -> Any:
        """What stands for `told` where `here` has been: a tensor of the model stays one."""
        if is_name(told):
            return self._tensors.get(told[_NAME], here)
        if isinstance(here, torch.Tensor) and not isinstance(told, (list, dict, str, type(None))):
            return here if self.refers(here) else torch.full_like(here, told)
        if isinstance(told, list):
            alike = isinstance(here, (list, tuple)) and len(here) == len(told)
            items = [self.from_json(old, item) for old, item in zip(here if alike else told, told, strict=True)]
            return tuple(items) if isinstance(here, tuple) else items
        if isinstance(told, dict):
            before = here if isinstance(here, dict) else {}
            return {key: self.from_json(before.get(key), item) for key, item in told.items()}
        return told


def _memory(tensor: torch.Tensor) -> int:
    return detached(tensor).untyped_storage().data_ptr()


def is_name(told: Any) -> bool:
    """Whether what was told is the name of a tensor of the model."""
    return isinstance(told, dict) and told.keys() == {_NAME}

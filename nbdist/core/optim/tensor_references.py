"""An optimizer's references to the model's tensors, in checkpoints: saved by name, not by value."""

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
    """Converts values that may be, or contain, tensors of the model to JSON-able data and back.

    Args:
        tensors: The model's own parameters and buffers, by name.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors
        self._names = {id(tensor): name for name, tensor in tensors.items()}

    def refers(self, value: Any) -> bool:
        """Whether a value is a tensor of the model, or shares memory with one."""
        if id(value) in self._names:
            return True
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            return False
        return _memory(value) in self._memories

    @functools.cached_property
    def _memories(self) -> set[int]:
        return {_memory(tensor) for tensor in self._tensors.values() if tensor.layout is torch.strided} - {0}

    def to_json(self, value: Any, what: str) -> Any:
        """A value as JSON-able data, see `plain`; the model's tensors become their names.

        Raises:
            TaskError: JSON cannot represent it.
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

    def from_json(self, current: Any, saved: Any) -> Any:
        """The value for `saved`, in the types of the `current` one; a tensor of the model stays that tensor."""
        if is_name(saved):
            return self._tensors.get(saved[_NAME], current)
        if isinstance(current, torch.Tensor) and not isinstance(saved, (list, dict, str, type(None))):
            return current if self.refers(current) else torch.full_like(current, saved)
        if isinstance(saved, list):
            alike = isinstance(current, (list, tuple)) and len(current) == len(saved)
            items = [self.from_json(old, item) for old, item in zip(current if alike else saved, saved, strict=True)]
            return tuple(items) if isinstance(current, tuple) else items
        if isinstance(saved, dict):
            before = current if isinstance(current, dict) else {}
            return {key: self.from_json(before.get(key), item) for key, item in saved.items()}
        return saved


def _memory(tensor: torch.Tensor) -> int:
    return detached(tensor).untyped_storage().data_ptr()


def is_name(saved: Any) -> bool:
    """Whether a saved value is the name of a tensor of the model."""
    return isinstance(saved, dict) and saved.keys() == {_NAME}

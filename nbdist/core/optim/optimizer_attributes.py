"""An optimizer's own attributes, beside torch's state and groups: saved in checkpoints, if they are plain data."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import torch

from nbdist.core.optim.json_value import plain
from nbdist.core.optim.tensor_references import TensorReferences
from nbdist.core.transfer.slots import attributes
from nbdist.errors import TaskError

__all__ = ["OwnAttributes", "load_attributes"]

_TORCHS = {"defaults", "state", "param_groups", "step", "_opt_called", "_zero_grad_profile_name"}
_TORCHS |= {"_warned_capturable_if_run_uncaptured"}
_SEQUENCES = (list, tuple, set, frozenset, collections.deque)


class OwnAttributes:
    """An optimizer's own attributes as JSON-able data; one that is not plain data must not change during a run.

    Args:
        optimizer: In its state at the start.
        references: To the model's tensors, which are saved by name.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, references: TensorReferences) -> None:
        self._optimizer = optimizer
        self._references = references
        self._at_first = {name: self._trace(value, {}) for name, value in _own(optimizer).items()}

    def state_dict(self) -> dict[str, Any]:
        """The attributes: numbers, strings, lists and dicts of them. Local.

        Raises:
            TaskError: An attribute of another type has changed since the start, as far as that can be detected.
        """
        state_dict = {}
        for name, value in _own(self._optimizer).items():
            what = f"the optimizer's {name}"
            try:
                state_dict[name] = self._references.to_json(value, what)
            except TaskError:
                if self._trace(value, {}) != self._at_first.get(name):
                    raise
        return state_dict

    def _trace(self, value: Any, seen: dict[int, Any]) -> Any:
        """A fingerprint of a value: it differs when the value has changed."""
        kind = type(value)
        if id(value) in seen or self._references.refers(value):
            return id(value)
        if isinstance(value, torch.Tensor):
            return id(value), value._version
        if kind is np.ndarray:
            return value.tobytes()
        seen[id(value)] = value
        if kind in _SEQUENCES:
            return kind, [self._trace(item, seen) for item in value]
        if isinstance(value, dict):
            return kind, [(self._trace(key, seen), self._trace(item, seen)) for key, item in value.items()]
        if isinstance(value, torch.optim.Optimizer):
            return self._trace(value.state, seen), self._trace(_own(value), seen)
        try:
            return plain(value, "")
        except TaskError:
            return id(value)


def load_attributes(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], references: TensorReferences) -> None:
    """Set an optimizer's own attributes to a `state_dict`, except names that its class defines. Local."""
    current = attributes(optimizer)
    common_state = state_dict.get("state")
    for key, value in common_state.items() if isinstance(common_state, dict) else ():
        optimizer.state[key] = references.from_json(optimizer.state.get(key), value)
    for name, value in state_dict.items():
        if (
            name in _TORCHS
            or name.startswith("_optimizer_")
            or (name not in current and hasattr(type(optimizer), name))
        ):
            continue
        setattr(optimizer, name, references.from_json(current.get(name), value))


def _own(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The attributes that are not torch's; as "state" the entries of `state` that belong to no single parameter."""
    everything = attributes(optimizer)
    own = {n: value for n, value in everything.items() if not (n in _TORCHS or n.startswith("_optimizer_"))}
    common = {key: value for key, value in everything.get("state", {}).items() if not isinstance(key, torch.Tensor)}
    return {**own, "state": common} if common else own

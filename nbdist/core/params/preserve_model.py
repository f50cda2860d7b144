"""Running the user's model in a dry run, and restoring its attributes, buffers and random states afterwards."""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nbdist.core.params.extra_state import extra_states, set_extra_states
from nbdist.core.process.rng import fork_rng

__all__ = ["device_of", "preserve_model"]


@contextlib.contextmanager
def preserve_model(model: nn.Module) -> Iterator[None]:
    """Restore the model's attributes, extra states, buffers, and all random states, at the end of the context. Local.

    Inside, gradients are enabled and autocast is off, whatever holds outside.
    """
    device = device_of(model)
    attributes = [(vars(module), _copied(vars(module))) for module in model.modules()]
    states = copy.deepcopy(extra_states(model))
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with (
        fork_rng(device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            yield
        finally:
            for current, saved in attributes:
                _restore(current, saved)
            set_extra_states(model, states)  # within objects, which attributes only refer to
            with torch.no_grad():
                for buffer, values in buffers:
                    if not torch.equal(buffer, values):
                        buffer.copy_(values)


def device_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, with a copy if it is a plain container."""
    plain = (dict, OrderedDict, list, set)
    return {name: (value, value.copy() if type(value) in plain else None) for name, value in attributes.items()}


def _restore(current: dict[str, Any], saved: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in current if name not in saved]:
        del current[name]
    for name, (value, contents) in saved.items():
        current[name] = value
        if isinstance(contents, list):
            value[:] = contents
        elif contents is not None:
            value.clear()
            value.update(contents)

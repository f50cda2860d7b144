"""Working with a model of the user's and leaving it exactly as it was."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nbdist.core.process.rng import kept

__all__ = ["device_of", "untouched"]


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Give attributes, buffers and all random states back at the end, whatever forward does to them. Local.

    Inside, gradients are recorded and nothing is cast automatically, whatever holds outside.
    """
    device = device_of(model)
    attributes = [(vars(module), _copied(vars(module))) for module in model.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    with (
        kept(device),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
    ):
        try:
            yield
        finally:
            for place, saved in attributes:
                _restore(place, saved)
            with torch.no_grad():
                for buffer, values in buffers:
                    if not torch.equal(buffer, values):
                        buffer.copy_(values)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first parameter lives."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


def _copied(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute, and beside it a copy where it is a plain container."""
    plain = (dict, OrderedDict, list, set)
    return {name: (value, value.copy() if type(value) in plain else None) for name, value in attributes.items()}


def _restore(place: dict[str, Any], saved: dict[str, tuple[Any, Any]]) -> None:
    for name in [name for name in place if name not in saved]:
        del place[name]
    for name, (value, contents) in saved.items():
        place[name] = value
        if isinstance(contents, list):
            value[:] = contents
        elif contents is not None:
            value.clear()
            value.update(contents)

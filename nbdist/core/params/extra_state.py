"""Extra state: what modules keep beside parameters and buffers, by torch's protocol: ``get_extra_state``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["extra_states", "set_extra_states", "stateful_modules"]


def stateful_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name, whose class has ``get_extra_state`` and ``set_extra_state``. Local."""
    plain = nn.Module
    return {
        name: module
        for name, module in model.named_modules()
        if type(module).get_extra_state is not plain.get_extra_state
        and type(module).set_extra_state is not plain.set_extra_state
    }


def extra_states(model: nn.Module) -> dict[str, Any]:
    """The extra state of each of these modules, by the module's name. Local."""
    return {name: module.get_extra_state() for name, module in stateful_modules(model).items()}


def set_extra_states(model: nn.Module, states: Mapping[str, Any]) -> None:
    """Set the extra state of the modules that are named. Local."""
    for name, module in stateful_modules(model).items() if states else ():
        if name in states:
            module.set_extra_state(states[name])

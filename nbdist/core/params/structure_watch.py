"""The structure of a model that a run relies on: which modules, parameters and buffers it has, and what is trained."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from nbdist.errors import TaskError

__all__ = ["StructureWatch"]

_CURE = (
    "nbdist decides at the start of a run what is trained where: stop the run, change the model in the notebook, and "
    "train on"
)


class StructureWatch:
    """Notices changes of a model's structure, and of its optimizers' groups, in the middle of a run. Local.

    Buffers may be made, replaced and resized: they are followed.

    Args:
        model: The model, with the strategy applied.
        optimizers: Its optimizers.
    """

    def __init__(self, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        self._modules: list[tuple[str, dict[str, Any], int]] = []
        self._held: list[tuple[str, dict[str, Any], str, Any]] = []
        self._trained: list[tuple[str, nn.Parameter, bool]] = []
        for name, module in model.named_modules():
            path = f"{name}." if name else ""
            for held in (module._modules, module._parameters):
                self._held += [(path + own, held, own, value) for own, value in held.items()]
            for held in (module._modules, module._parameters):
                if held:
                    self._modules.append((name or "the model", held, len(held)))
            self._trained += [
                (path + own, p, p.requires_grad) for own, p in module._parameters.items() if p is not None
            ]  # fmt: skip
        self._groups = [(optimizer.param_groups, _lengths(optimizer)) for optimizer in optimizers]

    def check(self, step: int) -> None:
        """Call before each update.

        Args:
            step: The number of steps done.

        Raises:
            TaskError: Something has changed.
        """
        for name, held, own, value in self._held:
            if held.get(own) is not value:
                raise TaskError(f"{name} was exchanged or removed in step {step + 1}: {_CURE}.")
        for name, parameter, trained in self._trained:
            if parameter.requires_grad is not trained:
                raise TaskError(f"{name} was {'frozen' if trained else 'unfrozen'} in step {step + 1}: {_CURE}.")
        for name, held, count in self._modules:
            if len(held) != count:
                raise TaskError(f"{name} has {len(held)} of what were {count} members in step {step + 1}: {_CURE}.")
        for groups, lengths in self._groups:
            if [len(group["params"]) for group in groups] != lengths:
                raise TaskError(f"the optimizer's groups have other parameters since step {step + 1}: {_CURE}.")


def _lengths(optimizer: torch.optim.Optimizer) -> list[int]:
    return [len(group["params"]) for group in optimizer.param_groups]

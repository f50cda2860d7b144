"""A user's function that is called at the end of each epoch, with the whole model: to sample, plot, save or stop."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from nbdist.core.params.extra_state import set_extra_states
from nbdist.core.params.made_buffers import adopt_buffers
from nbdist.core.params.param_table import ParamTable
from nbdist.core.params.training_mode import in_mode
from nbdist.core.process import rng
from nbdist.core.task.lost_changes import changed_rates, settings_of
from nbdist.core.task.modules import Modules
from nbdist.errors import TaskError

__all__ = ["EpochHook", "EpochState", "RankHook", "call_with"]


@dataclass(frozen=True, kw_only=True)
class EpochState:
    """What the function gets after an epoch.

    Args:
        number: Of the epoch, from 1.
        row: Its row of the history.
        tensors: Every parameter and buffer of the model, whole, by name.
        persistent: Whether each buffer is persistent, by name.
        extra: The extra state of modules, by name.
    """

    number: int
    row: dict[str, Any]
    tensors: Mapping[str, torch.Tensor]
    persistent: Mapping[str, bool]
    extra: Mapping[str, Any]

    def load_into(self, model: nn.Module) -> None:
        """Give an ordinary model these values, in place. Local."""
        adopt_buffers(model, dict(self.tensors), dict(self.persistent))
        ParamTable.of(model).load_(dict(self.tensors))
        set_extra_states(model, dict(self.extra))


class EpochHook(ABC):
    """Calls the function, wherever it runs; rank 0 has one, and the other ranks wait meanwhile."""

    @abstractmethod
    def begin(self, state: EpochState) -> None:
        """Call it, or have it called. Rank zero only."""

    @abstractmethod
    def answer(self, number: int) -> str | None:
        """Why the run is to end after an epoch, in a clause, or an empty string; None if that is not known yet.

        Waits for a moment at most. Rank zero only.
        """


class RankHook(EpochHook):
    """The function runs on rank 0, on a copy of the model.

    Args:
        model: The model, whole.
        function: ``each_epoch(model, row)``.
        name: Of the function.
        device: Where the copy is.
        optimizers: Of the run.

    Raises:
        TaskError: The model cannot be copied.
    """

    def __init__(
        self, model: nn.Module, function: Callable[[Any, Any], Any], name: str, device: torch.device,
        optimizers: Mapping[str, torch.optim.Optimizer],
    ) -> None:  # fmt: skip
        try:
            self._model = copy.deepcopy(model).to(device)
        except Exception as error:
            raise TaskError(
                f"each_epoch={name} gets a copy of the model, which cannot be copied: {type(error).__name__}: {error}"
            ) from error
        self._function, self._name, self._device, self._optimizers = function, name, device, optimizers
        self._answers: dict[int, str] = {}

    def begin(self, state: EpochState) -> None:
        """See `EpochHook`.

        Raises:
            TaskError: The function fails, or changes a parameter.
        """
        state.load_into(self._model)
        try:
            with rng.fork_rng(self._device):
                self._answers[state.number] = call_with(
                    self._model, self._function, state.row, self._name, self._optimizers
                )
        except TaskError:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            raise TaskError(f"each_epoch={self._name} fails after epoch {state.number}: {what}") from error

    def answer(self, number: int) -> str | None:
        """See `EpochHook`."""
        return self._answers.get(number)


def call_with(
    model: nn.Module, function: Callable[[Any, Any], Any], row: dict[str, Any], name: str,
    optimizers: Mapping[str, torch.optim.Optimizer],
) -> str:  # fmt: skip
    """Call ``each_epoch(model, row)`` with a model in evaluation mode, without gradients. Local.

    Returns:
        Why the run is to end, if it returned True; else nothing.

    Raises:
        TaskError: It changed a parameter, or a setting of an optimizer, which no rank would have noticed.
        Exception: What the function raises.
    """
    given = model.given if isinstance(model, Modules) else model
    settings = settings_of(optimizers)
    with torch.no_grad(), in_mode(model, training=False), _unchanged(model, name):
        returned = function(given, dict(row))
        changed_rates(name, settings, optimizers)
        true = isinstance(returned, (bool, np.bool_)) or (
            isinstance(returned, torch.Tensor) and returned.dtype is torch.bool
        )
        return f"{name} returned True" if true and returned else ""


@contextlib.contextmanager
def _unchanged(model: nn.Module, name: str) -> Iterator[None]:
    before = {key: (p, p._version, p.requires_grad) for key, p in model.named_parameters()}
    yield
    now = {key: (p, p._version, p.requires_grad) for key, p in model.named_parameters()}
    for key in {**before, **now}:
        was, has = before.get(key), now.get(key)
        if was is None or has is None or was[0] is not has[0] or was[1:] != has[1:]:
            raise TaskError(
                f"each_epoch={name} changes parameter {key} of the model, which does not reach the engines: change "
                "weights in after_step (--after-step), and what is trained between two runs."
            )

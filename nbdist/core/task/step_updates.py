"""Several optimizers in one step: `nbdist.update`, with which a step trains by one loss after another."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from nbdist.core.data.reader import Slice
from nbdist.core.task.step_output import no_scalar, parts_of, weight_of
from nbdist.errors import TaskError, suggest

if TYPE_CHECKING:
    from nbdist.core.task.task import Task

__all__ = ["IgnoredUpdates", "StepUpdates", "update"]

_present: StepUpdates | None = None


def update(loss: torch.Tensor, optimizer: Any = "", *, weight: Any = None, retain_graph: bool = False) -> None:
    """In a step, train the parameters of an optimizer by a loss, at once: for steps with several losses.

    A step that calls it is trained by these calls alone. Each stands for ``zero_grad()``, ``loss.backward()`` and
    ``step()`` of one optimizer in a loop of one process: gradients are computed for its parameters alone, averaged over
    the slices of the batch, clipped by `clip_norm`, and applied; what the step computes afterwards sees the new
    weights. A step may call it several times for an optimizer, or not in each. It has to stand in the step's own code,
    or in that of functions that it calls by name.

    **Collective** over the data axis: every rank calls it equally often, for the same optimizers in the same order.

    Args:
        loss: A scalar, the mean over the slice's samples. The history has it as ``loss_<optimizer>`` if
            optimizers have names, and the sum of a step's losses as ``loss``.
        optimizer: Its key, where the run's `optimizer` is a dict, its number in a list, or the ready-made optimizer
            itself; or several of these, for optimizers that step by the same loss. Then the history has it as
            ``loss_<optimizer>_<optimizer>``, and `clip_norm` is of all of them.
        weight: The number that the mean is over, if that is not the number of samples.
        retain_graph: As for ``backward``: whether a later loss of this step goes through the same graph.

    Raises:
        TaskError: It is called outside of a step; there is no such optimizer; the loss is no scalar that requires grad;
            ranks differ.
    """
    if _present is None:
        raise TaskError(
            "nbdist.update is called outside of a training step, or where nbdist did not find it: let it stand in the "
            "step's own code (a %%dist_train cell's body, or step=...), or in a function that this calls by name."
        )
    _present.update(loss, optimizer, weight, retain_graph)


class StepUpdates(ABC):
    """Runs steps that call `update`.

    Args:
        task: What is trained.

    Attributes:
        parameters: The trainable ones of each optimizer.
        part: The slice that is computed.
        calls: How often its step has called `update`.
    """

    part: Slice

    def __init__(self, task: Task) -> None:
        self._task = task
        self.parameters = {
            name: [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            for name, optimizer in task.optimizers.items()
        }
        self.calls = 0
        self._total: Any = 0.0
        self._weight: Any = 0

    def loss_and_weight(self, batch: Any, part: Slice) -> tuple[torch.Tensor, Any]:
        """Run the step on one slice, as `Task.loss_and_weight` does. **Collective** as `apply` is.

        Returns:
            The sum of the step's losses, and the weight of the first.

        Raises:
            TaskError: See `update`; or the step has not called it.
        """
        with self.in_use(part):
            returned = self._task.step(self._task.model, batch)
        if not self.calls:
            raise TaskError(
                "the step has nbdist.update in its code, and has not called it for a batch: call it for at least one "
                "loss in each."
            )
        log = returned if isinstance(returned, Mapping) else parts_of(returned)[2]
        if log is not None:
            self._task.log.add(log, part.index, self._weight)
        return self._total, self._weight

    @contextlib.contextmanager
    def in_use(self, part: Slice) -> Iterator[None]:
        """Context of the step on one slice, in which `update` calls `apply`. Local."""
        global _present
        before, _present = _present, self
        self.part, self.calls, self._total = part, 0, 0.0
        try:
            yield
        finally:
            _present = before

    def update(self, loss: Any, optimizer: Any, weight: Any, retain_graph: bool) -> None:
        """See the function `update`."""
        given = tuple(optimizer) if isinstance(optimizer, (list, tuple)) else (optimizer,)
        names = tuple(self._name_of(one) for one in given)
        for name in names:
            if not isinstance(name, str) or name not in self.parameters:
                known = ", ".join(filter(None, self.parameters)) or "one only, which has no name"
                shown = repr(name) if isinstance(name, str) else f"by a value of type {type(name).__name__}"
                raise TaskError(
                    f"nbdist.update names optimizer {shown}, and the run has {known}."
                    f"{suggest(str(name), self.parameters)}"
                )
        if not names or len({*names}) < len(names):
            raise TaskError(f"nbdist.update names the optimizers {names}: give one, or several, each once.")
        name = "_".join(names)
        of = f" for optimizer {', '.join(names)}" if name else ""
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise TaskError(f"the loss{of} must be a scalar tensor, but it is {no_scalar(loss)}.")
        if not loss.requires_grad:
            raise TaskError(
                f"the loss{of} does not require grad, so it trains nothing: give it as it was "
                "computed, without detach, no_grad or a backward of the step's own, which nbdist.update runs."
            )
        weight = weight_of(weight, self.part.samples) if self.part.samples else 0
        if not self.calls:
            self._weight = weight
        self.calls += 1
        self._total = self._total + loss.detach().reshape(())
        if name:
            self._task.log.add({f"loss_{name}": loss}, self.part.index, weight)
        with torch.autocast(loss.device.type, enabled=False):
            self.apply(names, loss if loss.ndim == 0 else loss.reshape(()), weight, retain_graph)
        torch.clear_autocast_cache()  # it may hold weights as they were before

    def _name_of(self, optimizer: Any) -> Any:
        """The name of an optimizer that the step calls by the object itself, or by its number."""
        if isinstance(optimizer, torch.optim.Optimizer):
            found = (name for name, one in self._task.optimizers.items() if one is optimizer)
            return next(found, optimizer)
        return str(optimizer) if isinstance(optimizer, int) else optimizer

    def parameters_of(self, names: Iterable[str]) -> list[nn.Parameter]:
        """Those of some optimizers. Local."""
        return [parameter for name in names for parameter in self.parameters[name]]

    @abstractmethod
    def apply(self, names: Sequence[str], loss: torch.Tensor, weight: Any, retain_graph: bool) -> None:
        """Run backward, and train the parameters of these optimizers. **Collective** over the data axis."""


class IgnoredUpdates(StepUpdates):
    """For steps that only show how they compute: nothing is updated. Local."""

    def apply(self, names: Sequence[str], loss: torch.Tensor, weight: Any, retain_graph: bool) -> None:
        """See `StepUpdates`."""

    @classmethod
    @contextlib.contextmanager
    def of(cls, task: Task) -> Iterator[None]:
        """Context of such steps of a task."""
        with cls(task).in_use(Slice(index=0, samples=1, batch=None)):
            yield

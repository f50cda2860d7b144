"""Training steps: the user's own, and those that nbdist makes of a loss, or of a model that computes its loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from nbdist.core.data.reader import Slice
from nbdist.core.task.losses import ClassLoss, Loss, compares_elements, is_torch_own, loss_name
from nbdist.core.task.mismatch import check_shapes, mismatch
from nbdist.errors import TaskError

__all__ = ["NO_CLOSURE", "NO_EVALUATION", "NO_LOSS", "ModelLossStep", "Step", "SupervisedStep", "no_pair"]

Step = Callable[[nn.Module, Any], Any]
"""``step(model, batch)``: the loss, a mean over samples, or ``(loss, weight)`` with the number that it is over.

A dict of numbers at the end, ``(loss, log)`` or ``(loss, weight, log)``, is the step's log, see `StepLog`.
"""

NO_LOSS = "no loss: name one (--loss mse, or loss='mse'), or write the step (a %%dist_train cell's body, or step=...)."

NO_CLOSURE = (
    "the step updates with nbdist.update, and an optimizer needs a closure, to compute a loss again within its step: "
    "use another one, such as adamw, or a step with one loss."
)
NO_EVALUATION = (
    "the step updates with nbdist.update, so it cannot measure the validation data: give evaluate=..., a function "
    "evaluate(model, batch) that returns a dict of numbers (--evaluate)."
)

_Context = contextlib.AbstractContextManager[Any]


class SupervisedStep:
    """The step of supervised training: the last element of a batch is the target, the others go to the model."""

    def __init__(self, loss: Loss, name: str = "") -> None:
        self.loss = loss
        self.infers_weight = not (isinstance(loss, ClassLoss) or is_torch_own(loss))
        self._name = name or loss_name(loss)
        self._by_element = compares_elements(loss)

    def __call__(self, model: nn.Module, batch: Any, part: Slice | None = None, graph: _Context | None = None) -> Any:
        """Return ``loss(model(*inputs), target)``, with its weight if that is known.

        Args:
            model: The model.
            batch: Inputs and target, on the device.
            part: The batch's slice, whose target can be counted without waiting for the GPU.
            graph: Context in which the loss is computed, see `LossGraph`.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) < 2:
            raise TaskError(no_pair("loss", batch))
        *inputs, target = batch
        output = model(*inputs)
        if self._by_element:
            check_shapes(self._name, output, target)
        try:
            with graph or contextlib.nullcontext():
                mean = self.loss(output, target)
        except Exception as error:
            ignored = self.loss.ignore_index if isinstance(self.loss, ClassLoss) else None
            known = None if self.infers_weight else mismatch(self._name, output, target, ignored)
            if known is None:
                raise
            raise known from error
        if not isinstance(self.loss, ClassLoss):
            return mean
        if part is not None:
            target = part.batch[-1] if part.target is None else part.target()
        return mean, self.loss.weight(mean, target)


class ModelLossStep:
    """The step of a model that takes the batch as keywords and computes its loss, like those of transformers."""

    def __call__(self, model: nn.Module, batch: Any, graph: _Context | None = None) -> Any:
        """Return the loss in ``model(**batch)``: an attribute or key ``loss``."""
        if not isinstance(batch, Mapping):
            raise TaskError(NO_LOSS)
        with graph or contextlib.nullcontext():
            output = model(**batch)
        loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if loss is None:
            raise TaskError(
                f"the batch is a dict, so the model must compute the loss, but model(**batch) returned "
                f"{type(output).__name__} without a loss: add labels to the batch, name a loss, or write the step."
            )
        return loss


def no_pair(what: str, batch: Any) -> str:
    """Why a batch has no target for a loss or metric, as a sentence."""
    shape = "a dict" if isinstance(batch, Mapping) else "a single value"
    return (
        f"{what} compares the model's output with the last element of a batch (x, y), but a batch here is {shape}: "
        "give (x, y) data, or write the step yourself."
    )

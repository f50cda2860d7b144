"""Loss functions by name (cross_entropy, mse, ...), and the weight of a mean: the number that it is over."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nbdist.core.task.loss_weight import counted_targets
from nbdist.errors import TaskError, suggest
from nbdist.plan.plan import REDUCTIONS

__all__ = [
    "LOSSES", "ClassLoss", "Loss", "compares_elements", "find_loss", "is_torch_own", "loss_name", "reduction_of",
]  # fmt: skip

Loss = Callable[[Any, Any], Any]
"""``loss(output, target)``: a mean, or ``(mean, weight)`` with the number (or sum of weights) that it is over."""

LOSSES: dict[str, Callable[..., torch.Tensor]] = {
    "bce": F.binary_cross_entropy_with_logits,
    "cross_entropy": F.cross_entropy,
    "huber": F.huber_loss,
    "kl_div": functools.partial(F.kl_div, reduction="batchmean"),
    "l1": F.l1_loss,
    "mae": F.l1_loss,
    "mse": F.mse_loss,
    "nll": F.nll_loss,
    "smooth_l1": F.smooth_l1_loss,
}
"""Losses by the names that ``--loss`` takes; "bce" takes logits."""


def reduction_of(loss: Any, given: str | None) -> str:
    """Whether a loss is a "mean" or a "sum" over samples: as it says itself, else as it is `given`.

    Raises:
        TaskError: It is `given` as something else than it says, or it says something else than these two.
    """
    bound = loss.keywords if isinstance(loss, functools.partial) else {}
    own = bound.get("reduction", getattr(loss, "reduction", None))
    if own is None:
        return given or "mean"
    own = "mean" if own == "batchmean" else own
    if own not in REDUCTIONS:
        raise TaskError(f"loss {loss_name(loss)} has reduction={own!r}: use reduction='mean', or 'sum'.")
    if given not in (None, own):
        raise TaskError(f"loss {loss_name(loss)} has reduction={own!r}, but reduction={given!r} is given: omit one.")
    return str(own)


def find_loss(loss: Any, reduction: str = "mean") -> Loss:
    """Turn a name or a callable into a loss that averages, or adds up, exactly over ranks and microbatches.

    Args:
        loss: The name, or the callable.
        reduction: See `reduction_of`.

    Raises:
        TaskError: The name is unknown, or the value is not callable.
    """
    if isinstance(loss, str):
        if loss not in LOSSES:
            raise TaskError(f"unknown loss {loss!r}: use {', '.join(LOSSES)}, or a callable.{suggest(loss, LOSSES)}")
        loss = LOSSES[loss]
    if isinstance(loss, type) and issubclass(loss, nn.Module):
        raise TaskError(f"loss {loss.__name__} is a class, not a loss: write {loss.__name__}().")
    if not callable(loss):
        raise TaskError(f"loss must be a name or a callable, not {loss!r}.")
    if reduction == "sum":
        known = any(loss is function for function in LOSSES.values())
        return functools.partial(getattr(loss, "func", loss), reduction="sum") if known else loss
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)) and is_torch_own(loss):
        return ClassLoss(loss, loss.ignore_index, loss.weight)
    if loss in (F.cross_entropy, F.nll_loss):
        return ClassLoss(loss, inspect.signature(loss).parameters["ignore_index"].default, None)
    if isinstance(loss, nn.Module) and (own := [n for n, p in loss.named_parameters() if p.requires_grad]):
        raise TaskError(
            f"loss {loss_name(loss)} has parameters of its own ({own[0]}), which would not be trained: make model and "
            "loss one module, whose forward(x, y) returns the loss, and train it by the step `loss = model(*batch)`; "
            "or freeze them: loss.requires_grad_(False)."
        )
    made: Loss = loss
    return made


def compares_elements(loss: Any) -> bool:
    """Whether a loss is one of torch's own that compares each element of an output with one of the target."""
    kinds = (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.KLDivLoss)
    functions = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, LOSSES["kl_div"])
    return is_torch_own(loss) and (isinstance(loss, kinds) or loss in functions)


def is_torch_own(loss: Any) -> bool:
    """Whether a loss is computed by torch's own code, for which it is known what its mean is over."""
    kind = type(loss)
    if isinstance(loss, nn.modules.loss._Loss):
        return kind.forward.__module__ == nn.modules.loss.__name__ and kind.__call__ is nn.Module.__call__
    return any(loss is known for known in LOSSES.values())


def loss_name(loss: Any) -> str:
    """The name of a loss in the plan and the panel."""
    if isinstance(loss, str):
        return loss
    if isinstance(loss, functools.partial):
        return loss_name(loss.func)
    return getattr(loss, "__name__", None) or type(loss).__name__


class ClassLoss:
    """A loss over classes whose mean skips ignored targets and weights the others by class.

    Its weight is its divisor, so ignored targets and class weights average exactly over slices of any size.
    """

    def __init__(self, loss: Callable[..., torch.Tensor], ignore_index: int, class_weight: torch.Tensor | None) -> None:
        self._loss = loss
        self.ignore_index = ignore_index
        self._class_weight = class_weight

    @property
    def given(self) -> Callable[..., torch.Tensor]:
        """The loss as it was given."""
        return self._loss

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The mean loss."""
        if isinstance(self._loss, nn.Module):
            self._loss.to(output.device)
        return self._loss(output, target)

    def weight(self, mean: torch.Tensor, target: torch.Tensor) -> torch.Tensor | int:
        """The weight of a mean: a number, or a scalar tensor where `target` lies."""
        if target.is_floating_point():  # probabilities of classes: the mean is over samples
            return target.numel() // max(1, target.shape[1] if target.ndim > 1 else target.shape[0])
        if self._class_weight is None and target.device.type == "cpu":
            counted_before = counted_targets(mean) if mean.device.type == "cpu" else None
            if counted_before is not None:
                return counted_before
            return int(np.count_nonzero(target.detach().numpy() != self.ignore_index))  # a third of torch's time
        counted = target != self.ignore_index
        if self._class_weight is None:
            return counted.sum()
        weights = self._class_weight.to(target.device)
        return (weights[target.where(counted, 0)] * counted).sum()

"""Metrics by name (accuracy, mae, mse): a mean per batch, averaged over the batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from nbdist.errors import TaskError, suggest

__all__ = ["METRICS", "Metric", "find_metric"]

Metric = Callable[[Any, Any], Any]
"""``metric(output, target)``: a mean, or ``(mean, weight)``."""


def accuracy(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of targets that the output predicts.

    Args:
        output: Scores ``(batch, classes, ...)`` or ``(batch, ..., classes)``; or one logit per target, ``(batch, ...)``
            or ``(batch, ..., 1)``.
        target: Class numbers ``(batch, ...)``, -100 for ignored ones; or 0 and 1 for logits.
    """
    if output.ndim == target.ndim + 1 and output.shape != (*target.shape, 1):
        classes_last = output.shape[:-1] == target.shape
        hits = output.argmax(-1 if classes_last else 1) == target
    else:
        hits = (output > 0).reshape(target.shape) == (target > 0.5)
    counted = target != -100
    total = counted.sum()
    return (hits & counted).sum().double() / total.clamp(min=1), total


def _mae(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).abs().mean()


def _mse(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().mean()


METRICS: dict[str, Metric] = {"accuracy": accuracy, "mae": _mae, "mse": _mse}
"""Metrics by the names that ``--metric`` takes."""


def find_metric(metric: Any) -> Metric:
    """Turn a name or a callable into a metric.

    Raises:
        TaskError: The name is unknown, or the value is not callable.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            raise TaskError(
                f"unknown metric {metric!r}: use {', '.join(METRICS)}, or a callable.{suggest(metric, METRICS)}"
            )
        return METRICS[metric]
    if not callable(metric):
        raise TaskError(f"metric must be a name or a callable, not {metric!r}.")
    made: Metric = metric
    return made

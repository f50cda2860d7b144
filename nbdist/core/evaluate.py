"""Evaluation: the validation data dealt out to all ranks, every sample counted exactly once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nbdist.core.data import Reader
from nbdist.core.strategies import Strategy
from nbdist.core.task import Task, first_dimension
from nbdist.core.weighted_mean import WeightedMean
from nbdist.errors import PlanError, TaskError

__all__ = ["evaluate", "switched"]


def evaluate(task: Task, strategy: Strategy, reader: Reader, *, metric: str = "") -> dict[str, float]:
    """Measure the model on the validation data. **Collective**.

    The metric sees what the last call of the model returned, and the last element of the batch.

    Args:
        task: The task; its model is put in evaluation mode and back.
        strategy: Where the model lies.
        reader: Over the validation data.
        metric: Name of the metric in the result, or empty for the loss alone.

    Returns:
        ``val_loss``, and ``val_<metric>``: weighted means over all samples.

    Raises:
        PlanError: The data gave nothing.
        TaskError: The metric cannot be measured on what the model or the data gave.
    """
    device = strategy.device
    loss_mean, metric_mean, samples = WeightedMean(device), WeightedMean(device), 0
    outputs: list[Any] = []

    def measure(batch: Any, samples: int) -> tuple[tuple[torch.Tensor, Any], tuple[Any, Any]]:
        loss = task.loss_and_weight(batch, samples)
        return loss, (0, 0) if task.metric is None else _measure(task, outputs, batch, samples, metric)

    hook = task.model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    try:
        with switched(task.model, training=False), torch.no_grad():
            for step, slices in enumerate(reader.epoch(1)):
                if slices is None:
                    break
                for part in slices:
                    outputs.clear()
                    measured = strategy.forward(part, ("val", step), measure)
                    if measured is not None and part.samples and strategy.axes.speaks:
                        loss_mean.add(*measured[0])
                        samples += part.samples
                        if task.metric is not None:
                            metric_mean.add(*measured[1])
    finally:
        hook.remove()
    counted = torch.tensor([samples], dtype=torch.float64, device=device)
    sums = torch.cat([loss_mean.sums, metric_mean.sums, counted])
    strategy.axes.world.all_reduce_(sums)
    loss_sum, loss_weight, metric_sum, metric_weight, samples = sums.tolist()
    if not samples:
        raise PlanError("the validation data gave no batch: can it be read only once?")
    result = {"val_loss": loss_sum / loss_weight if loss_weight else float("nan")}
    if task.metric is not None:
        result[f"val_{metric}"] = metric_sum / metric_weight if metric_weight else float("nan")
    return result


def _measure(task: Task, outputs: list[Any], batch: Any, samples: int, metric: str) -> tuple[Any, Any]:
    assert task.metric is not None
    if not outputs:
        raise TaskError(f"metric {metric} needs the model's output, but the step never called model(...).")
    if not isinstance(batch, (tuple, list)):
        raise TaskError(f"metric {metric} takes the last element of a batch as target, but a batch is a {type(batch)}.")
    given = task.metric(outputs[-1], batch[-1])
    return given if isinstance(given, tuple) else (given, first_dimension(batch, samples))


@contextlib.contextmanager
def switched(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module in training or evaluation mode, and each one back into the mode it had."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

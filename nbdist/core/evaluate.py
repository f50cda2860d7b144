"""Evaluation: validation loss and metric, with the data distributed over all ranks and each sample counted once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nbdist.core.data.reader import Reader, Slice
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.agreement import NO_FLAGS, agree
from nbdist.core.sync.loss_forms import check_one_form
from nbdist.core.sync.running_mean import RunningMean
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError

__all__ = ["evaluate", "in_mode"]

_NO_GRADIENT = "does not require grad and does not have a grad_fn"
_GRADIENTS_IN_EVALUATION = (
    "the step, or the model's forward, takes a gradient (by torch.autograd.grad, say), but evaluation runs without "
    "gradients on mesh {mesh}: do it in `with torch.enable_grad():`, or use the strategy data."
)


def evaluate(task: Task, strategy: Strategy, reader: Reader, *, metric: str = "") -> dict[str, float]:
    """Measure the model on the validation data. **Collective**.

    The metric is called with the output of the model's last call, and the last element of the batch.

    Args:
        task: The task; its model is put in evaluation mode and back.
        strategy: Runs the forwards.
        reader: Reads the validation data.
        metric: Name of the metric in the result, or empty for the loss alone.

    Returns:
        ``val_loss``, and ``val_<metric>``: weighted means over all samples.

    Raises:
        PlanError: The data gave no batch.
        TaskError: The metric cannot be computed from the model's output or the batch.
    """
    device = strategy.device
    # One sum per rank; under `reproducible` one per slice, so that bits do not depend on which rank ran which slice.
    by_slice = strategy.plan.reproducible > 0
    sums_by_place: dict[tuple[int, int], _Sums] = {}
    steps = 1
    outputs: list[Any] = []

    def measure(batch: Any, part: Slice) -> tuple[tuple[torch.Tensor, Any], tuple[Any, Any]]:
        outputs.clear()
        loss, weight = task.loss_and_weight(batch, part)
        measured = (0, 0)
        if task.metric is not None:
            outputs[:] = map(_detached, outputs)
            with torch.no_grad():
                measured = _measure(task, outputs, batch, part.samples, metric)
        return (loss.detach(), weight), measured

    needs_gradients = False

    def run(part: Slice, step: int) -> Any:
        """Without gradients, as long as the step takes none itself, as forces from energies are."""
        nonlocal needs_gradients
        if not needs_gradients:
            try:
                return strategy.forward(part, ("val", step), measure)
            except RuntimeError as error:
                if _NO_GRADIENT not in str(error):
                    raise
                if strategy.plan.mesh.size > strategy.plan.mesh.dp:
                    raise TaskError(_GRADIENTS_IN_EVALUATION.format(mesh=strategy.plan.mesh)) from error
            needs_gradients = True
        with torch.enable_grad():
            return strategy.forward(part, ("val", step), measure)

    hook = task.model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    task.forms.begin()
    try:
        with in_mode(task.model, training=False), torch.no_grad():
            for step, slices in enumerate(reader.epoch(1)):
                steps = step + 1 if by_slice else 1
                for part in slices:
                    measured = run(part, step)
                    if measured is not None and part.samples and strategy.axes.reports_loss:
                        place = (step, part.index) if by_slice else (0, 0)
                        sums_by_place.setdefault(place, _Sums(device)).add(part.samples, *measured)
    finally:
        hook.remove()
    world = strategy.axes.world
    if task.infers_weight:
        check_one_form(agree(task.forms.flags(NO_FLAGS, 0), world))
    table = torch.zeros((steps, strategy.plan.slices if by_slice else 1, 5), dtype=torch.float64, device=device)
    for place, one in sums_by_place.items():
        table[place] = one.sums
    world.all_reduce_(table)
    loss_sum, loss_weight, metric_sum, metric_weight, samples = table.sum((0, 1)).tolist()
    if not samples:
        raise PlanError("the validation data gave no batch: can it be read only once?")
    result = {"val_loss": loss_sum / loss_weight if loss_weight else float("nan")}
    if task.metric is not None:
        result[f"val_{metric}"] = metric_sum / metric_weight if metric_weight else float("nan")
    return result


class _Sums:
    """Weighted sums of losses and metrics, their weights, and the number of samples."""

    def __init__(self, device: torch.device) -> None:
        self._means = RunningMean(device), RunningMean(device)
        self._samples = 0

    def add(self, samples: int, loss: tuple[Any, Any], metric: tuple[Any, Any]) -> None:
        self._samples += samples
        for mean, measured in zip(self._means, (loss, metric), strict=True):
            mean.add(*measured)

    @property
    def sums(self) -> torch.Tensor:
        """``(5,)`` in float64."""
        samples = self._means[0].sums.new_tensor([self._samples])
        return torch.cat([mean.sums for mean in self._means] + [samples])


def _measure(task: Task, outputs: list[Any], batch: Any, samples: int, metric: str) -> tuple[Any, Any]:
    assert task.metric is not None
    if not outputs:
        raise TaskError(f"metric {metric} needs the model's output, but the step never called model(...).")
    if not isinstance(batch, (tuple, list)):
        raise TaskError(f"metric {metric} takes the last element of a batch as target, but a batch is a {type(batch)}.")
    value = task.metric(outputs[-1], batch[-1])
    return value if isinstance(value, tuple) else (value, samples)


def _detached(output: Any) -> Any:
    """A model's output without its graph, which only a step that takes gradients itself leaves in evaluation."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if type(output) in (tuple, list):
        return type(output)(map(_detached, output))
    return {key: _detached(value) for key, value in output.items()} if type(output) is dict else output


@contextlib.contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put every module in training or evaluation mode, and afterwards each one back into its own."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training

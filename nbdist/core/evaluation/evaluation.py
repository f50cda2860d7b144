"""Evaluation: validation loss and metric, with the data distributed over all ranks and each sample counted once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from nbdist.core.comm.world import World
from nbdist.core.data.reader import Reader, Slice
from nbdist.core.evaluation.own_evaluation import OwnEvaluation
from nbdist.core.evaluation.validation_metric import ValidationMetric
from nbdist.core.params.training_mode import in_mode
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.sync.agreement import NO_FLAGS, agree
from nbdist.core.sync.loss_forms import check_one_form
from nbdist.core.sync.running_mean import RunningMean
from nbdist.core.sync.step_log import LogReducer
from nbdist.core.task.task import Task
from nbdist.errors import PlanError, TaskError

__all__ = ["Evaluation", "Forwards"]

T = TypeVar("T")
_NO_GRADIENT = "does not require grad and does not have a grad_fn"
_GRADIENTS_IN_EVALUATION = (
    "the step, or the model's forward, takes a gradient (by torch.autograd.grad, say), but evaluation runs without "
    "gradients on mesh {mesh}: do it in `with torch.enable_grad():`, or use the strategy data."
)


class Evaluation:
    """Evaluations of one run. **Collective** over the world: all ranks construct it.

    Args:
        task: Its model is put in evaluation mode and back.
        strategy: Runs the forwards.
        reader: Reads the validation data.
        world: All ranks.
        metric: Name of the metric in the result, or empty for the loss alone.
    """

    def __init__(self, task: Task, strategy: Strategy, reader: Reader, world: World, *, metric: str = "") -> None:
        self._task, self._strategy, self._reader = task, strategy, reader
        self._metric = None if task.metric is None else ValidationMetric(task, strategy, world, metric)
        self._own = None if task.evaluate is None else OwnEvaluation(task, strategy, world)
        self._forwards = Forwards(strategy, "val")

    def run(self) -> dict[str, Any]:
        """Measure the model on the validation data. **Collective**.

        The metric is called with the output of the model's last call, and the target of the batch.

        Returns:
            ``val_loss``, a weighted mean over all samples, what the step logs, as ``val_<name>``, and the metric's
            values, see `ValidationMetric`; or what the user's own function gives, see `OwnEvaluation`.

        Raises:
            PlanError: The data gave no batch.
            TaskError: The metric cannot be computed from the model's output or the batch.
        """
        task, strategy, metric, own = self._task, self._strategy, self._metric, self._own
        device, world = strategy.device, strategy.axes.world
        # One sum per rank; under `reproducible` one per slice, so that bits do not depend on which rank ran which.
        by_slice = strategy.plan.reproducible > 0
        sums_by_place: dict[tuple[int, int], _Sums] = {}
        steps = 1
        outputs: list[Any] = []

        def measure(batch: Any, part: Slice) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
            outputs.clear()
            strategy.batch_gather.begin(counts=part.samples > 0)
            if own is not None:
                own.measure(batch, part)
                return (0, 0), (0, 0)
            loss, weight = task.loss_and_weight(batch, part)
            measured: tuple[Any, Any] = (0, 0)
            if metric is not None and strategy.axes.reports_loss:
                measured = metric.measure(outputs, batch, part, loss.detach())
            return (loss.detach(), weight), measured

        if metric is not None:
            metric.begin(self._reader.steps)
        if own is not None:
            own.begin()
        task.begin()
        with contextlib.ExitStack() as cleanup:
            cleanup.enter_context(task.carried.apart())
            if metric is not None:
                hook = task.model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
                cleanup.callback(hook.remove)
            with in_mode(task.model, training=False), torch.no_grad():
                for step, slices in enumerate(self._reader.epoch(1)):
                    steps = step + 1 if by_slice else 1
                    if by_slice:
                        task.log.begin_batch(step * strategy.plan.slices)
                    for part in slices:
                        measured = self._forwards.run(part, step, measure)
                        if measured is not None and part.samples and strategy.axes.reports_loss:
                            place = (step, part.index) if by_slice else (0, 0)
                            sums_by_place.setdefault(place, _Sums(device)).add(part.samples, *measured)
                    task.carried.end_step(step)
                    if metric is not None:
                        metric.end_batch()
                    if own is not None:
                        own.end_batch()
        if by_slice:  # a stream may end at different steps on different ranks
            steps = int(torch.stack(world.all_gather(torch.tensor([steps], device=device))).max())
        log_reducer = LogReducer.of(task.log, strategy.axes, strategy.plan, batches=steps)
        agreed = agree(log_reducer.flags(task.forms.flags(NO_FLAGS, 0)), world)
        check_one_form(agreed)
        log = log_reducer.reduce(agreed)
        table = torch.zeros((steps, strategy.plan.slices if by_slice else 1, 5), dtype=torch.float64, device=device)
        for place, one in sums_by_place.items():
            table[place] = one.sums
        world.all_reduce_(table)
        loss_sum, loss_weight, metric_sum, metric_weight, samples = table.sum((0, 1)).tolist()
        if not samples:
            raise PlanError("the validation data gave no batch: can it be read only once?")
        result: dict[str, Any] = {}
        if own is None:
            result["val_loss"] = loss_sum / loss_weight if loss_weight else float("nan")
        if log is not None:
            result |= {f"val_{name}": mean for name, mean in log.means.items()}
        if metric is not None:
            values = metric.end(metric_sum / metric_weight if metric_weight else 0.0, metric_weight)
            if both := result.keys() & values.keys():
                name = min(both)
                raise TaskError(f"the metric and the step's log both give {name}: log it under another name.")
            result |= values
        if own is not None:
            values = own.end()
            if both := result.keys() & values.keys():
                raise TaskError(f"evaluate gives {min(both)} twice, as a number and by an object: use another name.")
            result |= values
        return result


class Forwards:
    """Forwards without gradients, as long as the step or the model takes none itself, as forces from energies are.

    Args:
        strategy: Runs them.
        kind: A word for the path of their random numbers.
    """

    def __init__(self, strategy: Strategy, kind: str) -> None:
        self._strategy, self._kind = strategy, kind
        self._needs_gradients = False

    def run(self, part: Slice, step: int, function: Callable[[Any, Slice], T]) -> T | None:
        """`Strategy.forward`. **Collective** over a replica.

        Raises:
            TaskError: Gradients are needed, on a mesh that cannot take them here.
        """
        strategy, path = self._strategy, (self._kind, step)
        if not self._needs_gradients:
            try:
                return strategy.forward(part, path, function)
            except RuntimeError as error:
                if _NO_GRADIENT not in str(error):
                    raise
                if strategy.plan.mesh.size > strategy.plan.mesh.dp:
                    raise TaskError(_GRADIENTS_IN_EVALUATION.format(mesh=strategy.plan.mesh)) from error
            self._needs_gradients = True
        with torch.enable_grad():
            return strategy.forward(part, path, function)


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

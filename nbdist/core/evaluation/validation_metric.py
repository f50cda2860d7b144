"""How a metric is measured on the validation data: averaged over slices, called once on all, or updated by batches."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import sys
import warnings
from typing import Any

import torch

from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice
from nbdist.core.data.sample_rows import Rows, join, kept, nbytes
from nbdist.core.evaluation.metric_values import as_values
from nbdist.core.evaluation.sample_gather import SampleGather
from nbdist.core.evaluation.updated_metric import UpdatedMetric, follows_device
from nbdist.core.process import rng
from nbdist.core.process.memory import check_fits
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.task.label_shift import LabelShift
from nbdist.core.task.metrics import (
    FINISHES,
    METRICS,
    accumulates,
    is_count,
    named_errors,
    output_of,
    target_of,
    updates_by_pair,
)
from nbdist.core.task.task import Task
from nbdist.errors import TaskError

__all__ = ["ValidationMetric"]

_CPU = torch.device("cpu")
_NOTHING = (0, 0)


class ValidationMetric:
    """One metric of one run. **Collective** over the world: all ranks construct it.

    A metric by name, and a callable that returns ``(mean, weight)``, is averaged over slices. Any other callable is
    called once, with outputs and targets of the whole set on the CPU; an object with `update` and `compute` is updated
    by batches, as in one process. Both are on the gathering rank. The metric itself is copied before each evaluation.

    Args:
        task: Its metric.
        strategy: Runs the forwards.
        world: All ranks.
        name: What the metric is called.
    """

    def __init__(self, task: Task, strategy: Strategy, world: World, name: str) -> None:
        self._given: Any = task.metric
        self._name, self._device = name, strategy.device
        self._channel = strategy.axes.world
        self._kind = ""  # "mean", "whole" or "object", once that is known
        self._shift: LabelShift | None = None
        self._gather: SampleGather | None = None
        self._object: UpdatedMetric | None = None  # of one evaluation, on the gathering rank
        if any(self._given is known for known in METRICS.values()):
            self._kind, self._shift = "mean", LabelShift(task)
        else:
            self._kind = "object" if accumulates(self._given) else ""
            what = f"outputs or targets that metric {name} needs together"
            self._gather = SampleGather(world, strategy.plan.mesh, what)
        self._parts: list[Rows] = []
        self._batches: int | None = None

    def begin(self, batches: int | None) -> None:
        """Begin an evaluation of so many batches, None if that is not known. Local."""
        self._parts, self._batches = [], batches
        if self._kind == "object" and self._gather is not None and self._gather.gathers:
            self._object = UpdatedMetric(self._given, self._name, self._device)

    @torch.no_grad()
    def measure(self, outputs: list[Any], batch: Any, part: Slice, loss: torch.Tensor) -> tuple[Any, Any]:
        """Measure one slice, or keep what it gave; on reporting ranks.

        Args:
            outputs: What the model returned in the slice, the last one counts.
            batch: The slice's batch, on the device.
            part: The slice.
            loss: Its loss.

        Returns:
            A mean and its weight, which is 0 where the metric is not an average over slices.

        Raises:
            TaskError: The metric cannot be computed from the model's output or the batch, or raised an exception.
        """
        if not part.samples:
            return _NOTHING
        if not outputs:
            raise TaskError(f"metric {self._name} needs the model's output, but the step never called model(...).")
        output = kept_graphless(output_of(outputs[-1], self._given, self._name))
        target = target_of(batch, self._name)
        if self._shift is not None:
            output, target = self._shift(output, target, loss, self._name)
        elif not self._kind:
            found = self._find_kind(output, target)
            if found is not None:
                return found
        if self._kind == "mean":
            with named_errors(self._name):
                return self._mean(self._given(output, target))
        assert self._gather is not None
        follows = self._kind == "object" and follows_device(self._given)
        self._gather.put(part, output, target, device=self._device if follows else _CPU)
        return _NOTHING

    def _find_kind(self, output: Any, target: Any) -> tuple[Any, Any] | None:
        """Find out whether a callable is an average, the same on all ranks; returns the mean of this slice if so."""
        gather, found = self._gather, None
        assert gather is not None
        if not gather.gathers:
            self._kind = gather.hear()
            return None
        self._kind = "whole"
        # On copies, and unseen: a callable for the whole set may change its arguments, and may not like a part of it.
        value, out, err = None, io.StringIO(), io.StringIO()
        with (
            warnings.catch_warnings(record=True) as warned, contextlib.suppress(Exception), rng.fork_rng(self._device),
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), named_errors(self._name),
        ):  # fmt: skip
            value = self._given(kept(output), kept(target))
        if type(value) is tuple and len(value) == 2:
            found, self._kind = self._mean(value, first=True), "mean"
            sys.stdout.write(out.getvalue())
            sys.stderr.write(err.getvalue())
            for one in warned:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        gather.tell(self._kind)
        return found

    def _mean(self, value: Any, *, first: bool = False) -> tuple[Any, Any]:
        """A mean and its weight; `first` if nothing but the two values says that they are."""
        if type(value) is not tuple or len(value) != 2:
            raise TaskError(
                f"metric {self._name} returned (mean, weight) for one slice and {type(value).__name__} for another: "
                "return the same for each."
            )
        if any(isinstance(one, str) or (hasattr(one, "shape") and math.prod(one.shape) != 1) for one in value):
            raise TaskError(
                f"metric {self._name} returned two values that are not (mean, weight), two numbers: return a dict for "
                "several values."
            )
        if not is_count(value[1], sure=not first):
            raise TaskError(
                f"metric {self._name} returned ({float(value[0]):.4g}, {float(value[1]):.4g}), and in (mean, weight) "
                "the weight is the number that the mean is over, as an int: return a dict for two values."
            )
        return value

    def end_batch(self) -> None:
        """Take the rows of a batch to the gathering rank. Waits for slower ranks; on all reporting ranks."""
        gather = self._gather
        if gather is None or not gather.reports:
            return
        self._agree_on_kind()
        if self._kind == "mean":
            return
        self._take(gather.end_batch())

    def _agree_on_kind(self) -> None:
        """Where this rank has had no slice."""
        assert self._gather is not None
        if self._kind:
            return
        self._kind = "whole" if self._gather.gathers else self._gather.hear()
        if self._gather.gathers:
            self._gather.tell(self._kind)

    def _take(self, rows: list[Rows]) -> None:
        if self._object is not None:
            self._update(self._object, rows)
            return
        self._parts += rows
        if rows and self._batches is not None and len(self._parts) == len(rows):
            needed = self._batches * sum(nbytes(one.values) for one in rows)
            check_fits(
                needed, f"the outputs of all validation data, which metric {self._name} needs together,",
                "return (mean, weight) from it, use an object with update and compute, or let the model return less "
                "in evaluation, such as the argmax",
            )  # fmt: skip

    def end(self, mean: float, weight: float) -> dict[str, float]:
        """The values, by name. **Collective** over the world.

        Args:
            mean: The weighted mean over all slices, where it is one.
            weight: Its weight.
        """
        values: dict[str, Any] = {}
        gather = self._gather
        if gather is None:
            finish = FINISHES.get(self._given, float)
            return {f"val_{self._name}": finish(mean) if weight else float("nan")}
        if gather.reports:
            self._agree_on_kind()
            if self._kind != "mean":
                for rows in gather.end():
                    self._take(rows)
        if gather.gathers:
            values = self._values(mean, weight)
        self._parts, self._object = [], None
        received: dict[str, Any] = json.loads(self._channel.broadcast_bytes(json.dumps(values).encode(), gather.rank))
        return received

    def _update(self, metric: UpdatedMetric, rows: list[Rows]) -> None:
        """Update by a whole batch."""
        if not rows:
            return
        try:
            batches = [join(rows, self._name)]
        except TaskError:  # batches padded to different lengths: each slice is then a batch of its own
            batches = sorted(rows, key=lambda one: one.places.start)
        for one in batches:
            metric.update(functools.partial(_updated, *one.values))

    def _values(self, mean: float, weight: float) -> dict[str, Any]:
        if self._kind == "mean":
            return as_values(mean if weight else float("nan"), self._name)
        if self._object is not None:
            return as_values(self._object.compute(), self._name)
        with named_errors(self._name):
            if not self._parts:
                return as_values(float("nan"), self._name)
            parts, self._parts = self._parts, []
            whole = join(parts, f"outputs or targets that metric {self._name} needs together")
            del parts
            value = self._given(*whole.values)
            if type(value) is tuple and len(value) == 2:
                value, _ = self._mean(value, first=True)
            return as_values(value, self._name)


def _updated(output: Any, target: Any, metric: Any) -> None:
    if updates_by_pair(metric):
        metric.update((output, target))
    else:
        metric.update(output, target)


def kept_graphless(output: Any) -> Any:
    """A model's output without its graph, which only a step that takes gradients itself leaves in evaluation."""
    if isinstance(output, torch.Tensor):
        return output.detach()
    if type(output) in (tuple, list):
        return type(output)(map(kept_graphless, output))
    return {key: kept_graphless(value) for key, value in output.items()} if type(output) is dict else output

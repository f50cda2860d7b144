"""Evaluation by a user's function: numbers averaged over samples, and objects updated as in one process."""

from __future__ import annotations

import contextlib
import functools
import json
from typing import Any

from nbdist.core.comm.world import World
from nbdist.core.data.reader import Slice
from nbdist.core.data.sample_rows import Rows, has_rows, join
from nbdist.core.evaluation.metric_values import as_values
from nbdist.core.evaluation.sample_gather import SampleGather
from nbdist.core.evaluation.updated_metric import UpdatedMetric
from nbdist.core.strategies.strategy import Strategy
from nbdist.core.task.metrics import metric_name
from nbdist.core.task.recorded_updates import add_numbers, numbers_of, recorded, used_objects
from nbdist.core.task.task import Task
from nbdist.errors import TaskError

__all__ = ["OwnEvaluation"]


class OwnEvaluation:
    """``evaluate(model, batch)`` of one run, in place of the step. **Collective** over the world: all construct it.

    The numbers that it returns go into the task's log, weighted by samples. The arguments of each object's `update` are
    taken to the gathering rank, which updates a copy: by whole batches, where each slice has made one call with a row
    for each sample; else call by call, in the order of the samples.

    Args:
        task: Its `evaluate`.
        strategy: Runs the forwards.
        world: All ranks.
    """

    def __init__(self, task: Task, strategy: Strategy, world: World) -> None:
        self._task, self._function = task, task.evaluate
        self._name = metric_name(task.evaluate, "evaluate")
        self._channel, self._device = strategy.axes.world, strategy.device
        self._objects = used_objects(task.evaluate)
        self._gather: SampleGather | None = None
        if self._objects:
            what = f"what {self._name} updates {', '.join(self._objects)} with"
            self._gather = SampleGather(world, strategy.plan.mesh, what, alike=False)
        self._metrics: dict[str, UpdatedMetric] = {}
        self._named: dict[str, str] = {}

    def begin(self) -> None:
        """Begin an evaluation. Local."""
        self._named, self._metrics = {}, {}

    def measure(self, batch: Any, part: Slice) -> None:
        """Call the function on one slice, and keep what it gave.

        Raises:
            TaskError: It returned something else than such a dict.
            Exception: What the function raises.
        """
        assert self._function is not None
        with recorded(self._objects, self._name) as calls:
            returned = self._function(self._task.given, batch)
            numbers, named = numbers_of(returned, self._objects, calls, self._name)
        self._named |= named
        if self._gather is not None and self._gather.reports:
            self._gather.put(part, calls)
        add_numbers(self._task.log, numbers, part.index, part.samples, self._name)

    def end_batch(self) -> None:
        """Take the batch's calls to the gathering rank. Waits for slower ranks."""
        if self._gather is not None and self._gather.reports:
            self._take(self._gather.end_batch())

    def _take(self, rows: list[Rows]) -> None:
        ordered = sorted(rows, key=lambda one: one.places.start)
        for name in self._objects:
            made = [(one.places, one.values[0].get(name, [])) for one in ordered]
            calls: list[Any] = [call for _, of_slice in made for call in of_slice]
            if not calls:
                continue
            if all(len(of_slice) == 1 and has_rows(of_slice[0], len(places)) for places, of_slice in made):
                with contextlib.suppress(TaskError):  # batches padded to different lengths
                    calls = [join([Rows(places, of_slice[0]) for places, of_slice in made], name).values]
            if name not in self._metrics:
                self._metrics[name] = UpdatedMetric(self._objects[name], name, self._device)
            for args, kwargs in calls:
                self._metrics[name].update(functools.partial(_update, args, kwargs))

    def end(self) -> dict[str, Any]:
        """The values of the objects, by name. **Collective** over the world.

        Raises:
            TaskError: An object was returned, but never updated; or two have a value of one name.
        """
        gather = self._gather
        if gather is None:
            return {}
        if gather.reports:
            for rows in gather.end():
                self._take(rows)
        values: dict[str, Any] = {}
        if gather.gathers:
            for key, name in self._named.items():
                if name not in self._metrics:
                    raise TaskError(f"{self._name} returned {key}, but has never called update of {name}.")
                found = as_values(self._metrics[name].compute(), key)
                if both := found.keys() & values.keys():
                    raise TaskError(f"{self._name} gives {min(both)} twice: use another name.")
                values |= found
        self._metrics = {}
        received: dict[str, Any] = json.loads(self._channel.broadcast_bytes(json.dumps(values).encode(), gather.rank))
        return received


def _update(args: tuple[Any, ...], kwargs: dict[str, Any], metric: Any) -> None:
    metric.update(*args, **kwargs)

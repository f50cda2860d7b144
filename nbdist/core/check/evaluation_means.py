"""Whether the numbers that a user's evaluate(model, batch) returns are means, which slices and batches average."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch

from nbdist.core.check.findings import CannotBeChecked
from nbdist.core.check.muted import muted
from nbdist.core.check.samples import read_rows
from nbdist.core.check.sentences import evaluate_no_mean
from nbdist.core.comm.world import World
from nbdist.core.data.reader import copy_batch, to_device
from nbdist.core.params.program_state import ProgramState
from nbdist.core.params.training_mode import in_mode
from nbdist.core.process import rng
from nbdist.core.sync.agreement import raise_on_all
from nbdist.core.sync.step_log import StepLog
from nbdist.core.task.metrics import metric_name
from nbdist.core.task.recorded_updates import add_numbers, numbers_of, recorded, used_objects
from nbdist.core.task.task import Task
from nbdist.errors import NbdistError
from nbdist.plan import Plan

__all__ = ["check_evaluation_means"]

_SAMPLES = 8
_TOLERANCE = 1e-3
_ROUNDING = 1e-5
"""Of a number of size one or less, which may be what is left of larger ones."""


def check_evaluation_means(task: Task, plan: Plan, world: World) -> None:
    """Call it, if there is one to be checked, on a few samples and their halves on rank 0. **Collective**.

    Args:
        task: Its model is whole. Nothing is left of the calls.
        plan: Its options.
        world: All ranks.

    Raises:
        TaskError: A number is not the mean of those of the halves, or the function returned something else.
    """
    if task.evaluate is None or plan.check == "no":
        return
    found = ""
    if world.rank == 0:
        with contextlib.suppress(CannotBeChecked):
            found = _found(task, plan, world.device)
    raise_on_all(found, world.channel())


def _found(task: Task, plan: Plan, device: torch.device) -> str:
    """What is wrong, as a sentence; empty if nothing is, or it cannot be found out."""
    assert task.val is not None
    samples = min(_SAMPLES, task.val.samples or 0)
    halves = any(p.is_floating_point() and p.itemsize < 4 for p in task.model.parameters())  # an argmax may be another
    if samples < 2 or task.val.is_fed or halves:  # a stream is not read here, which would move it on
        return ""
    rows = [range(samples), range(samples // 2), range(samples // 2, samples)]
    state = ProgramState({"evaluate": task.evaluate, "model": task.model}, unwritten=task.model.parameters())
    if state.iterators or state.excess:
        return ""
    with rng.fork_rng(device), muted(), in_mode(task.model, training=False), torch.no_grad():
        try:
            rng.seed_all(rng.derive(plan.seed, "check"))
            batches = read_rows(task.val, rows)
            before = rng.generators(device)
            whole, *parts = (
                _means(task, to_device(copy_batch(batch), device), len(part))
                for batch, part in zip(batches, rows, strict=True)
            )
            if any(rng.drawn_since(before, device)):  # random numbers differ from call to call
                return ""
        except NbdistError as error:
            return str(error)
        except Exception:  # the first evaluation raises it, if it is not for the few samples
            return ""
        finally:
            state.restore()
    for name, (value, weight) in whole.items():
        mean = _mean([part[name] for part in parts if name in part])
        allowed = max(_TOLERANCE * max(abs(value), abs(mean)), _ROUNDING)
        if weight and math.isfinite(value) and math.isfinite(mean) and abs(value - mean) > allowed:
            return evaluate_no_mean(metric_name(task.evaluate, "evaluate"), name, value, mean, samples)
    return ""


def _means(task: Task, batch: Any, samples: int) -> Mapping[str, tuple[float, float]]:
    """The numbers of one call, with their weights."""
    assert task.evaluate is not None
    objects, name, log = used_objects(task.evaluate), metric_name(task.evaluate, "evaluate"), StepLog()
    with recorded(objects, name) as calls:
        numbers, _ = numbers_of(task.evaluate(task.given, batch), objects, calls, name)
    weights = add_numbers(log, numbers, 0, samples, name)
    return {key: (mean, float(weights[key])) for key, mean in log.means().items()}


def _mean(pairs: list[tuple[float, float]]) -> float:
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else math.nan

"""`nbdist.train` and `nbdist.predict`: for scripts, in one process or under torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from nbdist.core.check.known_checks import KnownChecks
from nbdist.core.comm.world import World
from nbdist.core.console import console_sink
from nbdist.core.params.unshard import check_whole
from nbdist.core.predict import predict as run_prediction
from nbdist.core.rehearsal import rehearse
from nbdist.core.result import Result
from nbdist.core.state.checkpoint_writer import check_resume
from nbdist.core.task.modules import with_averages
from nbdist.core.task.prediction import prediction_task
from nbdist.core.task.task import Task
from nbdist.core.train import fit
from nbdist.errors import PlanError
from nbdist.plan import Plan, available_cores
from nbdist.plan.option import check_known, takes_options
from nbdist.plan.predict_options import PREDICT_OPTIONS, PredictOptions
from nbdist.plan.train_options import TRAIN_OPTIONS, TrainOptions, Unpack
from nbdist.telemetry import JsonlSink, Sink, TextSink
from nbdist.telemetry.record import new_run_id, record_path

__all__ = ["predict", "train"]

_checks = KnownChecks()
engines_beside: Callable[[], int] = lambda: 0  # noqa: E731 - a cluster sets it
"""How many engines this process has, none of which `train` uses."""


@takes_options(TRAIN_OPTIONS)
def train(
    model: Any,
    data: Any,
    *,
    device: str = "auto",
    record: bool = True,
    verbose: bool = True,
    **options: Unpack[TrainOptions],
) -> Result:
    """Train `model` on all ranks of torchrun, or of an initialised process group; else in this process alone.

    **Collective** under torchrun: every rank calls it with the same arguments. Started with plain ``python``, the
    process is the only rank. Before the first step, rank 0's weights and buffers are sent to all ranks; when it
    returns, every rank's `model` holds the trained ones, whatever the mesh.

    Args:
        model: An ``nn.Module``; a dict, list or tuple of them, which the step gets as it is; or a callable that builds
            one: its weights then lie in files, for models that are too large for one process. See ``Result.model``.
        data: A Dataset, a DataLoader (its batch size is the global one), or a tuple of tensors or NumPy arrays.
        device: "auto", "cpu" or "cuda".
        record: Whether to keep a record of the run: one file per rank, one JSON line per event.
        verbose: Whether rank 0 shows progress on standard error: in a terminal all ranks, live; else an occasional
            line.
        **options: Each of `TRAIN_OPTIONS`; ``help(nbdist.train)`` explains them here.

    Returns:
        The state, the history (one dict an epoch) and the plan.

    Raises:
        PlanError: An option is invalid, or impossible here.
        TaskError: The model, the data or another argument cannot be used.
    """
    task, plan_options = Task.of_options(model, data, options)
    if verbose and (engines := engines_beside()):
        warnings.warn(
            f"nbdist.train trains in this process alone, beside {engines} running engines: for a run on them use "
            "%dist_train, or cluster.train, which takes the same arguments.", stacklevel=3,
        )  # fmt: skip
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    plan = Plan.create(ranks=size, cores=_cores(size), **plan_options)
    for module in task.modules.values():
        check_whole(module)
    if plan.resume:
        check_resume(plan, task.model, task.optimizers)
    with World.from_environment(device) as world, contextlib.ExitStack() as cleanup:
        run_id, live = _agree(plan, world, verbose and sys.stderr.isatty())
        if plan.check != "no":
            plan = replace(plan, checked=_agreed_check(task, plan, world))
        sinks: list[Sink] = []
        if record and not plan.rehearse:
            sinks.append(JsonlSink(record_path(run_id, world.rank)))
        if verbose and live:
            sinks.append(console_sink(world, run_id))
        elif verbose and world.rank == 0:
            sinks.append(TextSink())
        for sink in sinks:
            cleanup.callback(sink.close)
        if plan.rehearse:
            return replace(rehearse(task, plan, world, run_id=run_id, sinks=sinks), model=task.given)
        result = fit(task, plan, world, run_id=run_id, sinks=sinks)
        if plan.check != "no":
            _checks.add(task, plan, result.plan)
        ema = None if plan.ema is None or not plan.gather else with_averages(task.model, result.average)
        return replace(result, model=task.given, ema=ema)


@takes_options(PREDICT_OPTIONS)
def predict(model: Any, data: Any, *, device: str = "auto", **options: Unpack[PredictOptions]) -> Any:
    """The outputs of `model` for a data set, in its order, on all ranks of torchrun; else in this process alone.

    **Collective** under torchrun: every rank calls it with the same arguments. The model is in evaluation mode
    meanwhile, without gradients, and holds rank 0's weights on every rank when it returns.

    Args:
        model: An ``nn.Module``.
        data: As of `train`. The last element of a tuple is the target, and left out, unless the model's forward
            requires it; a dict is passed as keywords. A DataLoader's order is that of its dataset.
        device: "auto", "cpu" or "cuda".
        **options: Each of `PREDICT_OPTIONS`; ``help(nbdist.predict)`` explains them here.

    Returns:
        What the model returns, of all samples, on every rank: CPU tensors, concatenated along their first dimension,
        in the same tuples, dicts and model outputs. Entries of a dict without a row for each sample, such as a loss,
        are left out.

    Raises:
        PlanError: An option is invalid, or impossible here.
        TaskError: The model or the data cannot be used, or the outputs cannot be put together.
    """
    check_known(options, PREDICT_OPTIONS)
    given = {name: value for name, value in options.items() if value is not None}
    batch_size: Any = given.pop("batch_size", None)
    task = prediction_task(model, data, batch_size=batch_size)
    size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    plan = Plan.create(ranks=size, cores=_cores(size), **{**given, **task.options})
    check_whole(task.model)
    with World.from_environment(device) as world:
        _agree(plan, world, False)
        return run_prediction(task, plan, world)


def _agreed_check(task: Task, plan: Plan, world: World) -> str:
    """What rank 0 knows of an earlier check. **Collective**."""
    return world.channel().broadcast_bytes(_checks.find(task, plan).encode()).decode()


def _cores(size: int) -> int:
    """Cores of all hosts, assuming equal hosts."""
    return available_cores() * size // int(os.environ.get("LOCAL_WORLD_SIZE", size))


def _agree(plan: Plan, world: World, live: bool) -> tuple[str, bool]:
    """Check that all ranks have rank 0's plan; returns rank 0's run id and `live`. **Collective**."""
    agreed = world.channel().broadcast_bytes(json.dumps([new_run_id(), live, plan.to_dict()]).encode())
    run_id, live, plan_of_zero = json.loads(agreed)
    own = json.loads(json.dumps(plan.to_dict()))
    differing = [name for name in own if own[name] != plan_of_zero[name]]
    if differing:
        name = differing[0]
        raise PlanError(
            f"rank {world.rank} was given {name}={own[name]}, rank 0 {plan_of_zero[name]}: all ranks need the same."
        )
    return str(run_id), live

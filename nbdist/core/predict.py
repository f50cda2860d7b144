"""Prediction: a model's outputs for a data set, in its order, with the data distributed over all ranks."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from typing import Any

import torch

from nbdist.core.check.samples import with_head
from nbdist.core.comm import Channel
from nbdist.core.comm.world import World
from nbdist.core.data.feed import Feed
from nbdist.core.data.reader import Reader, Slice
from nbdist.core.data.sample_rows import Rows, from_note, join, nbytes, to_note, without_rowless
from nbdist.core.evaluation.evaluation import Forwards
from nbdist.core.evaluation.sample_gather import SampleGather
from nbdist.core.params.training_mode import in_mode
from nbdist.core.process import rng
from nbdist.core.process.memory import check_fits, keep_freed_pages
from nbdist.core.process.settings import threads
from nbdist.core.reporter import reporting_failure
from nbdist.core.strategies import choice
from nbdist.core.task.task import Task
from nbdist.core.task.task_device import on_device
from nbdist.errors import PlanError
from nbdist.plan import Plan
from nbdist.plan.mesh import AXES
from nbdist.telemetry import Event, Meter, Noted, Progress, RunFinished, RunStarted, Sink
from nbdist.telemetry.host import host_name

__all__ = ["predict"]

_WHAT = "the model's outputs"
_CPU = torch.device("cpu")


def predict(
    task: Task, plan: Plan, world: World, *, run_id: str = "", sinks: Sequence[Sink] = (), on_every_rank: bool = True
) -> Any:
    """Compute the outputs for a data set on this rank's share of it. **Collective**, as `fit` is.

    The model is in evaluation mode, without gradients, and ends as it was.

    Args:
        task: Of `prediction_task`.
        plan: All options.
        world: The ranks.
        run_id: Its name.
        sinks: Receive this rank's events.
        on_every_rank: Whether every rank gets the outputs and its whole model back, or the gathering rank the outputs
            alone.

    Returns:
        The outputs of all samples, in the order of the data, on the CPU: tensors are concatenated, in tuples, dicts and
        model outputs too. Entries of a dict without a row for each sample, such as a loss, are left out. None on the
        ranks that do not get them.

    Raises:
        PlanError: The mesh cannot be applied to the model, or the data gave no batch.
        TaskError: The outputs have no row for each sample, or differ in shape.
    """

    def emit(event: Event) -> None:
        for sink in sinks:
            sink.emit(event)

    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(reporting_failure(emit, world.rank))
        cleanup.enter_context(rng.fork_rng(world.device))
        cleanup.enter_context(threads(plan.threads))
        cleanup.enter_context(keep_freed_pages(return_large=plan.mesh.size > plan.mesh.dp))
        cleanup.enter_context(on_device(task, world.device))
        cleanup.enter_context(_frozen(task))
        cleanup.enter_context(in_mode(task.model, training=False))
        feed = Feed.of([task.data], world, plan.mesh, cleanup)
        if task.data.is_fed and plan.mesh.size > plan.mesh.dp:
            task = with_head(task, plan, feed, world if on_every_rank else None)
        strategy = choice.apply(task, plan, world)
        cleanup.callback(strategy.close)
        gather = SampleGather(world, plan.mesh, _WHAT)
        cleanup.callback(gather.close)
        reader = Reader(
            task.data, strategy.axes.data, feed=feed, batch_size=plan.batch_size,
            seed=plan.seed, device=world.device, pad=strategy.equal_slices,
        )  # fmt: skip
        cleanup.callback(reader.close)
        emit(RunStarted(
            rank=world.rank, run_id=run_id, title=task.title, plan=plan.to_dict(), steps_total=reader.steps,
            host=host_name(), pid=os.getpid(), device=str(world.device), stages=strategy.infos,
            place={axis: plan.mesh.coordinate(world.rank, axis) for axis in AXES},
        ))  # fmt: skip
        parts, left_out = list[Rows](), list[str]()

        def keep(batch: Any, part: Slice) -> None:
            output = task.step(task.model, batch)
            if gather.reports and part.samples:
                output, left_out[:] = without_rowless(output, part.samples)
                gather.put(part, output, device=_CPU)

        def report(step: int) -> None:
            speed, step_s, _ = meter.read(samples, step)
            emit(Progress(
                rank=world.rank, step=step, epoch=1, samples=samples, loss=None, samples_per_s=speed,
                memory_mib=0.0, step_s=step_s,
            ))  # fmt: skip

        forwards, meter, samples, step = Forwards(strategy, "predict"), Meter(), 0, -1
        with torch.no_grad():
            for step, slices in enumerate(reader.epoch(1)):
                for part in slices:
                    forwards.run(part, step, keep)
                    samples += part.samples
                parts += gather.end_batch() if gather.reports else []
                if gather.gathers and step == 0 and reader.steps is not None:
                    needed = reader.steps * sum(nbytes(rows.values) for rows in parts)
                    check_fits(needed, _WHAT, "let the model return less in evaluation mode, such as the argmax")
                if meter.due():
                    report(step + 1)
            for rows in gather.end():
                parts += rows
            report(step + 1)
        outputs = _joined(parts, strategy.axes.world, gather)
        if gather.gathers and left_out:
            emit(Noted(rank=world.rank, text=f"left out, having no row for each sample: {', '.join(left_out)}"))
        if on_every_rank:
            strategy.gather()
            outputs = _broadcast(outputs, strategy.axes.world, gather)
        emit(RunFinished(rank=world.rank, state="finished"))
        return outputs


def _joined(parts: list[Rows], channel: Channel, gather: SampleGather) -> Any:
    """The outputs of all slices on the gathering rank; else None. **Collective**: the data may have given no batch."""
    found = torch.tensor([len(parts)], device=channel.device)
    channel.broadcast_(found, gather.rank)
    if not found.item():
        raise PlanError("the data gave no batch: can it be read only once?")
    return join(parts, _WHAT).values[0] if parts else None


def _broadcast(outputs: Any, channel: Channel, gather: SampleGather) -> Any:
    """The outputs of the gathering rank, on every rank. **Collective**."""
    if channel.size == 1:
        return outputs
    note, tensors = to_note(outputs, _WHAT) if gather.gathers else (None, [])
    sizes = [[str(tensor.dtype)[6:], list(tensor.shape)] for tensor in tensors]
    note, sizes = json.loads(channel.broadcast_bytes(json.dumps([note, sizes]).encode(), gather.rank))
    received = []
    for i, (dtype, shape) in enumerate(sizes):
        own = tensors[i].to(channel.device) if gather.gathers else None
        tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=channel.device) if own is None else own
        if tensor.numel():
            channel.broadcast_(tensor.contiguous().view(-1).view(torch.uint8), gather.rank)
        received.append(tensor.to(_CPU))
    return outputs if gather.gathers else from_note(note, received)


@contextlib.contextmanager
def _frozen(task: Task) -> Any:
    """Context without parameters that are trained: no rank needs memory for gradients. Local."""
    trained = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)

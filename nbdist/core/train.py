"""The training loop, written once, straight down the page."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from nbdist.core import seeds, strategies
from nbdist.core.allocator import objects_set_aside, pages_kept
from nbdist.core.checkpoint import check_state, load, prepare, save
from nbdist.core.data import Reader
from nbdist.core.eager import eager
from nbdist.core.evaluate import evaluate, switched
from nbdist.core.gather import leave_in_parts
from nbdist.core.gradient_sync import Totals
from nbdist.core.source import Source
from nbdist.core.task import Task
from nbdist.core.weighted_mean import WeightedMean
from nbdist.core.world import World
from nbdist.errors import PlanError
from nbdist.plan import Plan
from nbdist.telemetry import (
    EpochFinished,
    Evaluating,
    Event,
    Meter,
    Progress,
    RunFailed,
    RunFinished,
    RunStarted,
    Sink,
    Worked,
)

__all__ = ["Result", "fit"]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training returns.

    Args:
        state: "finished" or "stopped".
        history: One dict an epoch (one for the whole run where steps are counted): `epoch`, `steps`, `samples`,
            `loss` (its weighted mean), `seconds`; then `val_loss` and `val_<metric>` where asked.
        plan: What was run.
    """

    state: str
    history: list[dict[str, Any]]
    plan: Plan


def fit(
    task: Task,
    plan: Plan,
    world: World,
    *,
    run_id: str = "",
    sinks: Sequence[Sink] = (),
    stop_requested: Callable[[], bool] = lambda: False,
    home: bool = True,
) -> Result:
    """Train. **Collective**: all ranks of `world`, with equal plans and data.

    Args:
        task: What to train; its model ends as an ordinary module with the trained weights, on the device it came on.
        plan: How.
        world: Where.
        run_id: Name of the run in the record.
        sinks: Who receives this rank's events.
        stop_requested: Asked before each step; where any rank answers yes, all stop after the same step.
        home: Whether the model ends whole on every rank, or on rank 0 alone.
    """
    model, device = task.model, world.device

    def tell(event: Event) -> None:
        for sink in sinks:
            sink.emit(event)

    with contextlib.ExitStack() as cleanup:
        cleanup.enter_context(seeds.kept(device))
        cleanup.enter_context(_threads(plan.threads))
        cleanup.enter_context(pages_kept(sparing=plan.mesh.size > plan.mesh.dp))
        cleanup.enter_context(objects_set_aside())
        cleanup.enter_context(_on_device(task, device))
        cleanup.enter_context(_reporting_failure(tell, world.rank))

        if not model.training:  # modules that the user froze in evaluation mode inside a training model stay so
            cleanup.enter_context(switched(model, training=True))

        if plan.save:
            prepare(plan.save, task.optimizer, world.channel())
        strategy = strategies.apply(task, plan, world)
        cleanup.callback(strategy.close)
        axes, optimizer = strategy.axes, task.optimizer
        if plan.resume:
            load(plan.resume, strategy.table, optimizer, axes)
        scheduler = task.make_scheduler(optimizer)

        def reader_of(source: Source, per_rank: int, shuffle: bool) -> Reader:
            reader = Reader(
                source, axes.data, told_by=axes.world, batch_size=plan.batch_size, per_rank=per_rank, seed=plan.seed,
                shuffle=shuffle, pin=device.type == "cuda", even=strategy.even,
            )  # fmt: skip
            cleanup.callback(reader.close)
            return reader

        reader = reader_of(task.data, plan.slices_per_rank, plan.shuffle)
        val_reader = reader_of(task.val, 1, False) if task.val is not None else None
        steps_total = _steps_total(plan, reader)

        started = RunStarted(
            rank=world.rank,
            run_id=run_id,
            title=task.title,
            plan=plan.to_dict(),
            steps_total=steps_total,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(device),
            stages=strategy.infos,
        )
        tell(started)
        meter = Meter()
        history: list[dict[str, Any]] = []
        step = samples = 0
        stopped = False
        latest: Totals | None = None
        # Under `steps`, the whole run is one row, however often it wraps round the data.
        row = _Row(device)

        for epoch in itertools.count(1):
            first_step = step
            for slices in reader.epoch(epoch):
                strategy.begin_step()
                step_weight, losses = strategy.forward_backward(step, slices or [])
                read = sum(part.samples for part in slices or ())
                samples += read
                row.samples += read

                totals = strategy.sync(step_weight, stop=stop_requested(), exhausted=slices is None)
                if slices is None and totals.exhausted == axes.data.size:
                    break
                # A rank that had data knows that there was some, without waiting for its GPU.
                if (not isinstance(step_weight, torch.Tensor) and step_weight > 0) or totals.weight:
                    updated = strategy.update(optimizer)
                    if updated and scheduler.every_step:
                        scheduler.step()
                step += 1
                row.steps += 1
                if plan.save and step == 1:
                    check_state(strategy.table, optimizer)
                for loss, weight in losses:
                    row.loss.add(loss, weight)

                if meter.due():
                    tell(_progress(world, step, epoch, samples, _mean(losses, device), meter.rate(samples)))
                if strategy.work and step & (step - 1) == 0:  # at steps 1, 2, 4, 8 ..., on all ranks the same
                    tell(Worked(rank=world.rank, step=step, work=tuple(strategy.work)))
                # A GPU is not waited for: there, ranks stop one step after the one in which they agreed to.
                heard, latest = totals if device.type == "cpu" else latest, totals
                stopped = heard is not None and heard.stop > 0
                if stopped or step == plan.steps:
                    break

            ended = stopped or step == plan.steps or epoch == plan.epochs
            if step == first_step:
                raise PlanError(f"the data gave no batch in epoch {epoch}: can it be read only once?")
            if not (ended or plan.epochs is not None):
                continue  # `steps` wraps round the data

            seconds = row.seconds  # before evaluation: a row counts training only
            strategy.share_buffers()
            tell(_progress(world, step, epoch, samples, row.loss, row.samples / seconds))
            measured: dict[str, float] = {}
            if val_reader is not None and not stopped:
                tell(Evaluating(rank=world.rank))
                measured = evaluate(task, strategy, val_reader, metric=plan.metric)
            history.append(row.close(strategy, len(history) + 1, seconds) | measured)
            tell(EpochFinished(rank=world.rank, row=history[-1]))
            if not scheduler.every_step:
                scheduler.step(measured.get("val_loss", history[-1]["loss"]))
            if ended:
                break
            row = _Row(device)

        if plan.save:
            save(plan.save, strategy.table, optimizer, axes)
        if plan.gather:
            strategy.gather(keep=home or world.rank == 0)
        else:
            leave_in_parts(model, strategy.table.placements, plan.mesh)
        state = "stopped" if stopped and not _complete(plan, step, steps_total) else "finished"
        tell(RunFinished(rank=world.rank, state=state))
        return Result(state=state, history=history, plan=plan)


class _Row:
    """Counts of one history row on this rank."""

    def __init__(self, device: torch.device) -> None:
        self.steps = 0
        self.samples = 0
        self.loss = WeightedMean(device)
        self._started_s = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds since the row began."""
        return time.perf_counter() - self._started_s

    def close(self, strategy: strategies.Strategy, epoch: int, seconds: float) -> dict[str, Any]:
        """The row over all ranks, the same on each; `seconds` are rank 0's. **Collective**."""
        axis = strategy.axes.world
        rank_zeros = seconds if axis.rank == 0 else 0.0
        counted = [self.samples if strategy.axes.speaks else 0, rank_zeros]  # of ranks that read the same, one counts
        counts = torch.tensor(counted, dtype=torch.float64, device=axis.device)
        sums = torch.cat([self.loss.sums, counts])
        axis.all_reduce_(sums)
        loss_sum, weight, samples, seconds = sums.tolist()
        return {
            "epoch": epoch,
            "steps": self.steps,
            "samples": round(samples),
            "loss": loss_sum / weight if weight else float("nan"),
            "seconds": seconds,
        }


def _steps_total(plan: Plan, reader: Reader) -> int | None:
    if reader.steps == 0:
        raise PlanError(f"drop_last leaves no batch of {plan.batch_size}: use a smaller batch size.")
    if plan.steps is not None:
        return plan.steps
    return None if reader.steps is None or plan.epochs is None else plan.epochs * reader.steps


def _complete(plan: Plan, step: int, steps_total: int | None) -> bool:
    return steps_total is not None and step >= steps_total


def _mean(losses: list[tuple[torch.Tensor, Any]], device: torch.device) -> WeightedMean:
    mean = WeightedMean(device)
    for loss, weight in losses:
        mean.add(loss, weight)
    return mean


def _progress(world: World, step: int, epoch: int, samples: int, loss: WeightedMean, speed: float) -> Progress:
    if world.device.type == "cuda":
        memory = torch.cuda.memory_allocated(world.device)
    else:
        memory = psutil.Process().memory_info().rss
    return Progress(
        rank=world.rank, step=step, epoch=epoch, samples=samples, loss=loss.value,
        samples_per_s=speed, memory_mib=memory / 2**20,
    )  # fmt: skip


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _on_device(task: Task, device: torch.device) -> Iterator[None]:
    before = next(task.model.parameters()).device
    _move(task, before, device)
    try:
        yield
    finally:
        _move(task, device, before)


def _move(task: Task, source: torch.device, target: torch.device) -> None:
    if source == target:
        return
    task.model.to(target)
    if task.optimizer.state:
        with eager():
            task.optimizer.load_state_dict(task.optimizer.state_dict())  # puts each state where its parameter is


@contextlib.contextmanager
def _reporting_failure(tell: Callable[[Event], None], rank: int) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        tell(RunFailed(rank=rank, error=f"{type(error).__name__}: {error}"))
        raise

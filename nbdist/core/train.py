"""The training loop, written once, straight down the page."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from nbdist.core.comm import comm_timer
from nbdist.core.comm.world import World
from nbdist.core.control.commands import Commands
from nbdist.core.control.step_control import StepControl
from nbdist.core.data.reader import Reader
from nbdist.core.data.sources import Source
from nbdist.core.evaluate import evaluate, switched
from nbdist.core.params.gather import leave_in_parts
from nbdist.core.process import rng
from nbdist.core.process.memory import objects_set_aside, pages_kept
from nbdist.core.process.settings import deterministic, threads, uninterrupted
from nbdist.core.reporter import Reporter, rate_of
from nbdist.core.state.checkpoint_reader import CheckpointReader
from nbdist.core.state.checkpoint_writer import checkpoint_of_run, prepare, resumed_folder
from nbdist.core.state.progress import TrainProgress
from nbdist.core.state.restore import load, opened_by_all, position_of, same_mesh
from nbdist.core.state.snapshot import RankSnapshots, newest, read
from nbdist.core.state.snapshotter import Snapshotter
from nbdist.core.strategies import choice
from nbdist.core.sync.gradient_hooks import GradientHooks, check_hooks
from nbdist.core.sync.gradient_sync import Totals
from nbdist.core.sync.loss_forms import check_one_form
from nbdist.core.sync.running_mean import RunningMean
from nbdist.core.task.task import Task, on_device
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan
from nbdist.plan.mesh import AXES
from nbdist.telemetry import (
    EpochFinished,
    Evaluating,
    Event,
    RunFailed,
    RunFinished,
    RunStarted,
    Sink,
    Worked,
)
from nbdist.telemetry.host import host_name
from nbdist.telemetry.tensorboard import TensorBoardSink

__all__ = ["Result", "fit"]

T = TypeVar("T")
_END: Any = object()


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a training returns.

    Args:
        state: "finished" or "stopped"; "scaled" if it is to go on on other ranks.
        history: One dict an epoch (one for the whole run where steps are counted): `epoch`, `steps`, `samples`,
            `loss` (its weighted mean), `seconds`; then `val_loss` and `val_<metric>` where asked.
        plan: What was run.
        ranks: How many there are to be from here on, where that was asked for; else 0.
    """

    state: str
    history: list[dict[str, Any]]
    plan: Plan
    ranks: int = 0


def fit(
    task: Task,
    plan: Plan,
    world: World,
    *,
    run_id: str = "",
    sinks: Sequence[Sink] = (),
    commands: Commands | None = None,
    on_every_rank: bool = True,
    snapshot_paths: Sequence[Sequence[str]] = (),
    from_snapshot: bool = False,
) -> Result:
    """Train. **Collective**: all ranks of `world`, with equal plans and data.

    Args:
        task: What to train; its model ends as an ordinary module with the trained weights, on the device it came on.
        plan: How.
        world: Where.
        run_id: Name of the run in the record.
        sinks: Who receives this rank's events.
        commands: What a user asks for while it goes on; given on all ranks or on none, rank 0's are read.
        on_every_rank: Whether the model ends whole on every rank, or on rank 0 alone.
        snapshot_paths: The slots for each rank's snapshots, see `SnapshotStore`; without them none are taken.
        from_snapshot: Whether to resume from the newest snapshot, if there is one, or from this run's last checkpoint.
    """
    model, device = task.model, world.device

    def tell(event: Event) -> None:
        for sink in sinks:
            sink.emit(event)

    with contextlib.ExitStack() as cleanup:
        if plan.tensorboard and world.rank == 0:
            sinks = [*sinks, TensorBoardSink(plan.tensorboard, run_id)]
            cleanup.callback(sinks[-1].close)
        cleanup.enter_context(rng.kept(device))
        cleanup.enter_context(threads(plan.threads))
        if plan.reproducible:
            cleanup.enter_context(deterministic())
        cleanup.enter_context(pages_kept(sparing=plan.mesh.size > plan.mesh.dp))
        cleanup.enter_context(objects_set_aside())
        cleanup.enter_context(on_device(task, device))
        cleanup.enter_context(_reporting_failure(tell, world.rank))

        if not model.training:  # modules that the user froze in evaluation mode inside a training model stay so
            cleanup.enter_context(switched(model, training=True))

        lease = prepare(plan.checkpoint, task.optimizer, world.channel(), run_id) if plan.checkpoint else None
        if lease is not None:
            cleanup.callback(lease.release)
        check_hooks(model, task.optimizer, plan.mesh)
        hooks = GradientHooks(model)
        cleanup.callback(hooks.put_back)
        strategy = choice.apply(task, plan, world)
        cleanup.callback(strategy.close)
        axes, optimizer = strategy.axes, task.optimizer
        scheduler = task.make_scheduler(optimizer)
        at, restored = TrainProgress(device), set[str]()
        rng.seed_all(rng.derive(plan.seed, "start", axes.data.rank))
        for saved in _kept(plan, world, snapshot_paths, run_id, from_snapshot):
            load(saved, strategy.table, optimizer, axes)
            scheduler.load_state_dict(saved.ranks[0]["scheduler"])
            strategy.precision.load_state_dict(saved.ranks[0]["precision"])
            at, restored = position_of(saved, axes, device), saved.names
            if saved.complete:  # a rank that is lost goes on from there again, before it takes a snapshot
                restored = restored & {*strategy.table.buffers}
            rng.seed_all(rng.derive(plan.seed, "start", axes.data.rank, at.step))
            if same_mesh(saved, axes) and saved.ranks[world.rank]["generators"]:
                rng.load_state_dict(saved.ranks[world.rank]["generators"])
            axes.world.all_reduce_(torch.ones(1, device=device))  # where weights are shared, everybody's are there

        def reader_of(source: Source, slices: int, shuffle: bool) -> Reader:
            reader = Reader(
                source, axes.data, told_by=axes.world, batch_size=plan.batch_size, slices=slices, seed=plan.seed,
                shuffle=shuffle, device=device, even=strategy.even, dealt_by_slice=plan.reproducible > 0,
            )  # fmt: skip
            cleanup.callback(reader.close)
            return reader

        reader = reader_of(task.data, plan.slices, plan.shuffle)
        val_reader = reader_of(task.val, plan.reproducible, False) if task.val is not None else None
        steps_total = _steps_total(plan, reader)
        snapshotter = Snapshotter(
            strategy, plan, scheduler, RankSnapshots(snapshot_paths[world.rank]) if snapshot_paths else None,
            tell, run_id, lease, changed=restored,
        )  # fmt: skip
        cleanup.callback(snapshotter.close)
        step_control = StepControl(commands, run_id, strategy, scheduler, snapshotter, tell)

        def is_stopped() -> bool:  # after its last step a training ends as it would have
            return step_control.stopped and not _complete(plan, at.step, steps_total)

        started = RunStarted(
            rank=world.rank, run_id=run_id, title=task.title, plan=plan.to_dict(), steps_total=steps_total,
            host=host_name(), pid=os.getpid(), device=str(device), stages=strategy.infos,
            place={axis: plan.mesh.coordinate(world.rank, axis) for axis in AXES}, lr=rate_of(optimizer), step=at.step,
            history=at.history,
        )  # fmt: skip
        tell(started)
        reporter = Reporter(world, at, optimizer, tell)
        latest: Totals | None = None

        with _rescuing(snapshotter, at, world):
            step_control.begin(at)
            at.row.leave_out(rested_s := step_control.pause_point(at))
            reporter.leave_out(rested_s)
            stopped = is_stopped()
            # Under `steps`, the whole run is one row, however often it wraps round the data.
            while not (at.complete(plan) or (stopped and at.row.steps == 0)):
                trained = stopped or at.step == plan.steps  # only the end of the run is left to do
                for slices in () if trained else _awaited(reader.epoch(at.epoch, skip=at.batch)):
                    strategy.begin_step()
                    task.forms.begin()
                    step_weight, losses = strategy.forward_backward(at.step, slices or [])
                    if plan.stop_on_nan:
                        _check_finite(losses, at)

                    own_flags = snapshotter.flags(at)._replace(
                        commands=step_control.pending(at), exhausted=slices is None
                    )
                    own_flags = task.forms.flags(own_flags, at.step)
                    loss = _mean(losses, device)
                    totals = strategy.sync(step_weight, own_flags, loss.parts)
                    if slices is None and totals.flags.exhausted == axes.data.size:
                        break
                    if latest is None or not strategy.lag:  # later a GPU is not waited for
                        check_one_form(totals.flags)
                    snapshotter.begin_update()
                    # A rank that had data knows that there was some, without waiting for its GPU.
                    if (not isinstance(step_weight, torch.Tensor) and step_weight > 0) or totals.weight:
                        updated = strategy.update(optimizer, hooks)
                        if updated and scheduler.every_step:
                            scheduler.step()
                    at.advance(sum(part.samples for part in slices or ()), strategy.counted(losses, totals))

                    agreed, latest = latest if strategy.lag else totals, totals
                    flags = None if agreed is None else agreed.flags
                    check_one_form(flags)
                    step_control.apply_agreed(at, flags)
                    snapshotter.end_step(at, flags)
                    if agreed is not None:
                        reporter.report(agreed, at.step - (agreed is not totals))
                    reporter.tell_if_due(at, loss)
                    if strategy.work and at.step & (at.step - 1) == 0:  # at steps 1, 2, 4, 8 ..., on all ranks the same
                        tell(Worked(rank=world.rank, step=at.step, work=tuple(strategy.work)))
                    if rested_s := step_control.pause_point(at):
                        at.row.leave_out(rested_s)
                        reporter.leave_out(rested_s)
                    stopped = is_stopped()
                    if stopped or at.step == plan.steps:
                        break

                check_one_form(None if latest is None else latest.flags)
                if at.batch == 0 and not stopped:
                    raise PlanError(f"the data gave no batch in epoch {at.epoch}: can it be read only once?")
                ended = stopped or at.step == plan.steps or at.epoch == plan.epochs
                if not (ended or plan.epochs is not None):
                    at.next_epoch(None)  # `steps` wraps round the data
                    continue
                if stopped:
                    snapshotter.finish(at)  # as it is in the middle of an epoch, to go on from

                seconds = at.row.seconds  # before evaluation: a row counts training only
                strategy.share_buffers()
                reporter.tell(at, at.row.loss.value, at.row.samples / seconds)
                measured: dict[str, float] = {}
                if val_reader is not None and not stopped:
                    tell(Evaluating(rank=world.rank))
                    measured = evaluate(task, strategy, val_reader, metric=plan.metric)
                row = at.row.close(axes.world, axes.reports_loss, len(at.history) + 1, seconds) | measured
                tell(EpochFinished(rank=world.rank, row=row))
                snapshotter.begin_update()
                if not scheduler.every_step:
                    scheduler.step(measured.get("val_loss", row["loss"]))
                if plan.epochs is not None and not stopped:
                    at.next_epoch(row)
                else:
                    at.close(row)
                snapshotter.end_step(at, None)
                reporter.resume(at)
                if ended:
                    break

            if not stopped:
                snapshotter.finish(at)
        if plan.gather:
            strategy.gather(keep=on_every_rank or world.rank == 0)
        else:
            leave_in_parts(model, strategy.table.placements, plan.mesh)
        state = "stopped" if stopped else "finished"
        tell(RunFinished(rank=world.rank, state=state))
        state = "scaled" if stopped and step_control.scaling else state
        return Result(state=state, history=at.history, plan=plan, ranks=step_control.scaling)


def _kept(
    plan: Plan, world: World, snapshot_paths: Sequence[Sequence[str]], run_id: str, from_snapshot: bool
) -> Iterator[CheckpointReader]:
    """What to go on from, on all ranks the same: a checkpoint, then a snapshot, without what never changes.

    Where there is no snapshot of this run, the checkpoint is its own last one, if it has written any. **Collective**.
    """
    found = newest(snapshot_paths) if from_snapshot else None
    if plan.resume or (from_snapshot and plan.checkpoint):
        folder = ""
        if world.rank == 0:
            own = from_snapshot and found is None and checkpoint_of_run(plan, run_id) is not None
            folder = plan.checkpoint if own else resumed_folder(plan) if plan.resume else ""
        folder = world.channel().broadcast_bytes(folder.encode()).decode()
        if folder:
            yield opened_by_all(folder, world)
    if found is not None:
        yield CheckpointReader.in_memory(read(found[1]))


@contextlib.contextmanager
def _rescuing(snapshotter: Snapshotter, at: TrainProgress, world: World) -> Iterator[None]:
    """After an error, release the peers that wait for this rank at once, and then keep what it has achieved."""
    try:
        yield
    except BaseException:
        with uninterrupted():
            if world.store is not None:  # a world of somebody else's is theirs to leave
                world.leave()
            snapshotter.rescue(at)
        raise


def _check_finite(losses: list[tuple[torch.Tensor, Any]], at: TrainProgress) -> None:
    for loss, _ in losses:
        if not torch.isfinite(loss):
            raise TaskError(
                f"the loss is {loss.item()} in step {at.step + 1}: lower the learning rate, clip the gradient "
                "(clip_norm), or look at the data of this step."
            )


def _steps_total(plan: Plan, reader: Reader) -> int | None:
    if reader.steps == 0:
        raise PlanError(f"drop_last leaves no batch of {plan.batch_size}: use a smaller batch size.")
    if plan.steps is not None:
        return plan.steps
    return None if reader.steps is None or plan.epochs is None else plan.epochs * reader.steps


def _complete(plan: Plan, step: int, steps_total: int | None) -> bool:
    return steps_total is not None and step >= steps_total


def _mean(losses: list[tuple[torch.Tensor, Any]], device: torch.device) -> RunningMean:
    mean = RunningMean(device)
    for loss, weight in losses:
        mean.add(loss, weight)
    return mean


def _awaited(batches: Iterable[T]) -> Iterator[T]:
    """Take count of the time for which a batch is waited for."""
    iterator = iter(batches)
    while True:
        with comm_timer.reading():
            batch = next(iterator, _END)
        if batch is _END:
            return
        yield batch


@contextlib.contextmanager
def _reporting_failure(tell: Callable[[Event], None], rank: int) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        tell(RunFailed(rank=rank, error=f"{type(error).__name__}: {error}"))
        raise

"""The training loop: `fit` runs one rank of a training, from the first weights to the last checkpoint."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from nbdist import interrupts
from nbdist.core.check.after_step import check_after_step
from nbdist.core.check.evaluation_means import check_evaluation_means
from nbdist.core.check.explained import explained
from nbdist.core.check.findings import Findings
from nbdist.core.check.samples import check_same_val, with_head
from nbdist.core.check.short_batch import check_short_batch
from nbdist.core.check.step_check import StepCheck
from nbdist.core.comm import comm_timer
from nbdist.core.comm.world import World
from nbdist.core.control.commands import Commands
from nbdist.core.control.step_control import StepControl
from nbdist.core.data.excerpt import Excerpt
from nbdist.core.data.feed import Feed
from nbdist.core.data.reader import Reader
from nbdist.core.data.sources import Source
from nbdist.core.data.workers import worker_errors
from nbdist.core.epoch_end import EpochEnd
from nbdist.core.evaluation.evaluation import Evaluation
from nbdist.core.params.structure_watch import StructureWatch
from nbdist.core.params.training_mode import in_mode
from nbdist.core.params.unshard import record_placements
from nbdist.core.params.weight_copies import WeightCopies
from nbdist.core.process import rng
from nbdist.core.process.memory import frozen_gc, keep_freed_pages, keep_large_pages
from nbdist.core.process.settings import deterministic, threads
from nbdist.core.reporter import Reporter, reporting_failure
from nbdist.core.result import Result
from nbdist.core.state.checkpoint_writer import prepare
from nbdist.core.state.extra_states import ExtraStates, check_extra_states
from nbdist.core.state.restore import load, load_carried, load_copies, load_whole, progress_of, same_mesh
from nbdist.core.state.resumed_states import resumed_states
from nbdist.core.state.snapshot import RankSnapshots
from nbdist.core.state.snapshotter import Snapshotter
from nbdist.core.state.train_progress import TrainProgress
from nbdist.core.strategies import choice
from nbdist.core.sync.gradient_hooks import GradientHooks, check_hooks
from nbdist.core.sync.loss_forms import check_one_form
from nbdist.core.sync.step_log import LogReducer
from nbdist.core.sync.step_tail import Totals
from nbdist.core.task.after_step import AfterStep
from nbdist.core.task.each_epoch import EpochHook, RankHook
from nbdist.core.task.notes import notes_on_modes, notes_on_optimizers, notes_on_outside, outside_parameters
from nbdist.core.task.task import Task
from nbdist.core.task.task_device import on_device
from nbdist.errors import PlanError
from nbdist.plan import Plan
from nbdist.plan.mesh import AXES
from nbdist.telemetry import (
    Event,
    Noted,
    RunFinished,
    RunStarted,
    Sink,
    Worked,
)
from nbdist.telemetry.host import host_name
from nbdist.telemetry.tensorboard import TensorBoardSink

__all__ = ["fit"]


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
    epoch_hook: EpochHook | None = None,
    excerpts: tuple[Excerpt | None, Excerpt | None] = (None, None),
) -> Result:
    """Train on this rank. **Collective**: all ranks of `world`, with equal plans and data.

    Args:
        task: What to train; its model ends as an ordinary module with the trained weights, on its former device.
        plan: All options.
        world: The ranks.
        run_id: Name of the run in the record.
        sinks: Receive this rank's events.
        commands: The user's commands during the run; given on all ranks or on none, rank 0's are read.
        on_every_rank: Whether `gather` gives every rank all weights, or rank 0 alone.
        snapshot_paths: Each rank's snapshot buffers, see `SnapshotStore`; without them no snapshots are taken.
        epoch_hook: Where the user's function runs at the end of each epoch, for rank 0; by default there.
        from_snapshot: Whether to resume from the newest snapshot, if there is one, or from this run's last checkpoint.
        excerpts: Cut epochs of the training data short, and evaluations.
    """
    model, device = task.model, world.device

    def emit(event: Event) -> None:
        for sink in sinks:
            sink.emit(event)

    with contextlib.ExitStack() as cleanup:
        if plan.tensorboard and world.rank == 0:
            sinks = [*sinks, TensorBoardSink(plan.tensorboard, run_id)]
            cleanup.callback(sinks[-1].close)
        cleanup.enter_context(rng.fork_rng(device))
        cleanup.enter_context(threads(plan.threads))
        if plan.reproducible:
            cleanup.enter_context(deterministic())
        cleanup.enter_context(keep_freed_pages(return_large=plan.mesh.size > plan.mesh.dp))
        cleanup.enter_context(frozen_gc())
        cleanup.enter_context(on_device(task, device))
        beginning = [RunStarted(
            rank=world.rank, run_id=run_id, title=task.title, plan=plan.to_dict(), steps_total=plan.steps,
            host=host_name(), pid=os.getpid(), device=str(device),
            place={axis: plan.mesh.coordinate(world.rank, axis) for axis in AXES},
        )]  # fmt: skip
        cleanup.enter_context(reporting_failure(emit, world.rank, beginning, task.own_step))
        cleanup.enter_context(worker_errors())
        if task.each_epoch is not None and epoch_hook is None and world.rank == 0:  # while the model is whole
            epoch_hook = RankHook(model, task.each_epoch, plan.each_epoch, device, task.optimizers)
        notes, outside = notes_on_modes(task) + notes_on_optimizers(task), outside_parameters(task)

        for module in task.modules.values():
            if not module.training:  # else leave submodules as they are: the user may have set some to evaluation mode
                cleanup.enter_context(in_mode(module, training=True))

        checks = plan.check != "no" and not (plan.checked or from_snapshot) and plan.mesh.size * plan.slices > 1
        feed = Feed.of([task.data, task.val], world, plan.mesh, cleanup)
        if task.data.is_fed and (checks or (on_every_rank and world.size > 1) or plan.mesh.size > plan.mesh.dp):
            task = with_head(task, plan, feed, world if on_every_rank else None)
        lease = prepare(plan.checkpoint, task.optimizers, world.channel(), run_id) if plan.checkpoint else None
        if lease is not None:
            cleanup.callback(lease.release)
        check_extra_states(model, plan)
        check_hooks(model, task.optimizers.values(), plan.mesh)
        hooks = GradientHooks(model)
        cleanup.callback(hooks.restore)
        saved_states = [*resumed_states(plan, world, snapshot_paths, run_id, from_snapshot)]
        check, findings = None, Findings(result=plan.checked)
        if checks:
            check = StepCheck(task, plan, world, hooks)
            onto_whole = [functools.partial(load_whole, saved, model, task.optimizers) for saved in saved_states]
            with task.carried.apart():
                check.run_plain(onto_whole, same_weights=not on_every_rank)
        elif from_snapshot or plan.checked.startswith("loss"):  # it has been seen with slices of other sizes
            task.forms.trust()
        if not from_snapshot:
            check_same_val(task, plan, world, apart=on_every_rank)
            with task.carried.apart():
                check_evaluation_means(task, plan, world)
            check_short_batch(task, plan, world, hooks)
            notes += check_after_step(task, plan, world, sent=not on_every_rank)
        with explained(plan.mesh, check is not None and check.runs_alone), task.carried.apart():
            strategy = choice.apply(task, plan, world, hooks)
            cleanup.callback(strategy.close)
            cleanup.enter_context(strategy.batch_gather.in_use())
            load_onto = functools.partial(
                load, model=model, table=strategy.table, optimizers=task.optimizers, axes=strategy.axes
            )
            if check is not None:
                check.compare(strategy, [functools.partial(load_onto, saved) for saved in saved_states])
                findings = check.findings
        axes, schedulers = strategy.axes, task.make_schedulers(plan.schedule_by)
        progress, restored = TrainProgress(device), set[str]()
        rng.seed_all(rng.derive(plan.seed, "start", axes.data.rank))
        for saved in saved_states:
            load_onto(saved)
            schedulers.load_state_dict(saved.ranks[0]["schedulers"])
            strategy.precision.load_state_dict(saved.ranks[0]["precision"])
            progress, restored = progress_of(saved, axes, device), saved.names
            # A recovery loads this checkpoint again before a snapshot, which may leave out frozen parameters in it.
            if saved.complete:
                restored = restored & {*strategy.table.buffers}
            rng.seed_all(rng.derive(plan.seed, "start", axes.data.rank, progress.step))
            if same_mesh(saved, axes) and saved.ranks[world.rank]["generators"]:
                rng.load_state_dict(saved.ranks[world.rank]["generators"])
            # A barrier: where ranks share the memory of weights, each has now loaded its own.
            axes.world.all_reduce_(torch.ones(1, device=device))

        copies = WeightCopies(plan, strategy.table, axes)
        for saved in saved_states:
            load_copies(saved, copies, strategy.table, axes)
            load_carried(saved, task.carried, plan, device)
        saved_states.clear()  # they keep files mapped
        extra = ExtraStates(model, axes)

        def reader_of(source: Source, slices: int, shuffle: bool, excerpt: Excerpt | None) -> Reader:
            reader = Reader(
                source, axes.data, feed=feed, batch_size=source.batch_size or plan.batch_size, slices=slices,
                seed=plan.seed, shuffle=shuffle, device=device, pad=strategy.equal_slices,
                excerpt=excerpt,
            )  # fmt: skip
            cleanup.callback(reader.close)
            return reader

        reader = reader_of(task.data, plan.slices, plan.shuffle, excerpts[0])
        evaluation = None
        if task.val is not None:
            val_reader = reader_of(task.val, plan.reproducible, False, excerpts[1])
            evaluation = Evaluation(task, strategy, val_reader, world, metric=plan.metric)
        steps_total = _steps_total(plan, reader)
        snapshotter = Snapshotter(
            strategy, plan, schedulers, RankSnapshots(snapshot_paths[world.rank]) if snapshot_paths else None,
            emit, extra, copies, run_id, lease, changed=restored,
        )  # fmt: skip
        cleanup.callback(snapshotter.close)
        step_control = StepControl(commands, run_id, strategy, schedulers, snapshotter, emit)

        epoch_end = EpochEnd(strategy, plan, world, evaluation, extra, copies, epoch_hook, emit)

        def is_stopped() -> bool:  # a stop after the last step changes nothing: the run is finished
            return step_control.stopped and not _complete(plan, progress.step, steps_total)

        emit(replace(
            beginning.pop(), steps_total=steps_total, stages=strategy.infos, lr=schedulers.rate, step=progress.step,
            history=progress.history, checked=findings.result,
        ))  # fmt: skip
        notes += schedulers.notes(plan.epochs, steps_total, (progress.epoch - 1, progress.step))
        for note in [*findings.notes, *(notes if progress.step == 0 else ())] if world.rank == 0 else ():
            emit(Noted(rank=world.rank, text=note))
        reporter = Reporter(world, progress, schedulers, emit)
        after_step = AfterStep(task, plan, device)
        log_reducer = LogReducer.of(task.log, axes, plan)
        structure = StructureWatch(model, task.optimizers.values())
        latest: Totals | None = None

        strategy.set_modes(training=True)
        with _snapshot_on_error(snapshotter, progress, world):
            step_control.begin(progress)
            progress.row.exclude(paused_s := step_control.pause_point(progress))
            reporter.exclude(paused_s)
            stopped = is_stopped()
            # Under `steps`, the whole run is one row, however often it wraps round the data.
            ended = progress.row.steps == 0 and (stopped or epoch_end.ends(progress) or epoch_end.was_ended(progress))
            while not (progress.complete(plan) or ended):
                # Resumed after the last step: only evaluation and the history row are left to do.
                trained = stopped or progress.step == plan.steps
                for slices in () if trained else comm_timer.reading(reader.epoch(progress.epoch, skip=progress.batch)):
                    if task.updates:  # within the step
                        snapshotter.begin_update()
                    strategy.begin_step()
                    task.begin()
                    losses = strategy.forward_backward(progress.step, slices)
                    for note in notes_on_outside(outside) if progress.step == 0 == world.rank else ():
                        emit(Noted(rank=world.rank, text=note))
                    structure.check(progress.step)
                    if plan.stop_on_nan:
                        losses.check_finite(progress.step + 1)

                    own_flags, pending = snapshotter.flags(progress), step_control.pending(progress)
                    if pending:
                        own_flags = own_flags._replace(commands=pending)
                    own_flags = log_reducer.flags(task.forms.flags(own_flags, progress.step))
                    totals = strategy.sync(own_flags)
                    # On a GPU, reading the flags waits for it: only the first step does, before weights change.
                    known = totals.flags if latest is None or not strategy.lag else latest.flags
                    check_one_form(known)
                    totals.log = log_reducer.reduce(known)
                    snapshotter.begin_update()
                    # Update if any rank had data. A rank that had some knows it without reading totals from its GPU.
                    if losses.any_known or totals.weight:
                        computing = functools.partial(strategy.compute_again, progress.step, slices)
                        updated = strategy.update(computing)
                        if latest is None and plan.mesh.shard > 1 and plan.mesh.pp == 1:
                            keep_large_pages()  # the optimizer's state has its place
                        if updated:
                            with strategy.batch_gather.at_step(progress.step):
                                after_step.call(progress.step)
                            copies.end_update()
                            schedulers.end_update()
                    task.carried.end_step(progress.step)
                    counted = strategy.reducer.counted_losses(totals)
                    of_all = {} if snapshotter.replica is None else snapshotter.replica.of_all_ranks(slices, totals)
                    progress.advance(sum(part.samples for part in slices), counted, totals.log, **of_all)

                    # On a GPU these are the previous step's totals, so that no step waits for the device; all ranks
                    # see them after the same step.
                    agreed, latest = latest if strategy.lag else totals, totals
                    flags = None if agreed is None else agreed.flags
                    step_control.apply_agreed(progress, flags)  # before the snapshot, which counts applied commands
                    snapshotter.end_step(progress, flags)
                    if agreed is not None:
                        reporter.add_totals(agreed, progress.step - (agreed is not totals))
                    reporter.report_if_due(progress, losses.mean)
                    if strategy.work and progress.step & (progress.step - 1) == 0:  # steps 1, 2, 4, 8 ... on every rank
                        emit(Worked(rank=world.rank, step=progress.step, work=tuple(strategy.work)))
                    if paused_s := step_control.pause_point(progress):
                        progress.row.exclude(paused_s)
                        reporter.exclude(paused_s)
                    stopped = is_stopped()
                    if stopped or progress.step == plan.steps:
                        break

                # With a lag, the last step's flags have not been read yet.
                check_one_form(None if latest is None else latest.flags)
                if strategy.lag and latest is not None and (rest := log_reducer.reduce(latest.flags)) is not None:
                    progress.row.add_log(rest)
                if progress.batch == 0 and not stopped:
                    raise PlanError(f"the data gave no batch in epoch {progress.epoch}: can it be read only once?")
                ended = stopped or progress.step == plan.steps or progress.epoch == plan.epochs
                if not (ended or plan.epochs is not None):
                    snapshotter.begin_update()
                    schedulers.end_epoch()
                    task.carried.end_epoch()
                    progress.next_epoch(None)  # under `steps`, the row continues
                    snapshotter.end_step(progress, None)
                    continue
                if stopped:
                    snapshotter.finish(progress)  # before the row is closed, so that a resumed run continues it

                row = epoch_end.row(progress, reporter, stopped=stopped)
                # The end of an epoch changes state too: an error inside it must not leave half of the change.
                snapshotter.begin_update()
                if not stopped:
                    epoch_end.keep(row)
                    schedulers.end_row(row.get("val_loss", row["loss"]))
                if plan.epochs is not None and not stopped:
                    schedulers.end_epoch()
                    task.carried.end_epoch()
                    progress.next_epoch(row)
                else:
                    progress.close(row)
                snapshotter.end_step(progress, None)
                called = not stopped and epoch_end.call(progress)
                reporter.resume(progress)
                ended = ended or called or epoch_end.ends(progress)

            if not stopped:
                snapshotter.finish(progress)
        strategy.set_modes(training=False)
        extra.gather()
        if plan.keep_best and not step_control.scaling:
            strategy.write(copies.put_best())
        frozen_stays = snapshotter.frozen_stay()
        average = copies.gather_average(axes, keep=on_every_rank or world.rank == 0) if plan.gather else {}
        if plan.gather:
            strategy.gather(keep=on_every_rank or world.rank == 0)
        else:
            for name, module in task.modules.items():
                record_placements(module, strategy.table.placements, plan.mesh, name and f"{name}.")
        state = "stopped" if stopped else "finished"
        emit(RunFinished(rank=world.rank, state=state))
        state = "scaled" if stopped and step_control.scaling else state
        plan = replace(plan, checked=findings.result)
        return Result(
            state=state, history=progress.history, plan=plan, ranks=step_control.scaling, average=average,
            frozen_stays=frozen_stays,
        )  # fmt: skip


@contextlib.contextmanager
def _snapshot_on_error(snapshotter: Snapshotter, progress: TrainProgress, world: World) -> Iterator[None]:
    """On an error, first leave the world, so that waiting peers fail at once; then snapshot the last complete step."""
    try:
        yield
    except BaseException:
        with interrupts.ignored():
            if world.store is not None:  # without a store, the process group, if any, belongs to the caller
                world.leave()
            snapshotter.snapshot_on_error(progress)
        raise


def _steps_total(plan: Plan, reader: Reader) -> int | None:
    if reader.steps == 0:
        raise PlanError(f"drop_last leaves no batch of {plan.batch_size}: use a smaller batch size.")
    if plan.steps is not None:
        return plan.steps
    return None if reader.steps is None or plan.epochs is None else plan.epochs * reader.steps


def _complete(plan: Plan, step: int, steps_total: int | None) -> bool:
    return steps_total is not None and step >= steps_total

"""The run queue of a cluster: one run at a time, the others wait."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nbdist import interrupts
from nbdist.cluster.diagnose.where import Where
from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.runs.dispatch import RunDispatch
from nbdist.cluster.runs.epoch_calls import EpochCalls
from nbdist.cluster.runs.host_snapshots import HostSnapshots
from nbdist.cluster.runs.monitor import RunMonitor, Watch, draw
from nbdist.cluster.runs.reattach import take_over
from nbdist.cluster.runs.resume import resumed
from nbdist.cluster.runs.run import Run, attend
from nbdist.cluster.runs.run_control import RunControl
from nbdist.cluster.runs.run_spec import RUN_OPTIONS, RunSpec, check_run_options
from nbdist.cluster.runs.start_state import keep_start
from nbdist.core.check.known_checks import KnownChecks
from nbdist.core.state.checkpoint_writer import check_no_live_writer
from nbdist.core.state.extra_states import check_extra_states
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.core.sync.gradient_hooks import check_hooks
from nbdist.core.task.prediction import prediction_task
from nbdist.core.task.task import Task
from nbdist.core.transfer.payload import SegmentCache
from nbdist.engine.epoch_hook import EpochRequests
from nbdist.engine.follow.changes import NotebookChanges
from nbdist.errors import ClusterError, NbdistError, PeerLostError, TaskError, ranks_text
from nbdist.plan import Plan
from nbdist.plan.option import check_known
from nbdist.plan.predict_options import PREDICT_OPTIONS
from nbdist.plan.train_options import TRAIN_OPTIONS
from nbdist.telemetry import RankState, RunState
from nbdist.telemetry.record import new_run_id

__all__ = ["RunQueue"]

_TRIES = 3
"""Starts during each of which an engine is lost."""


@dataclass(frozen=True)
class _QueuedRun:
    """A run that has not started, who watches it, and how many changes of the notebook came before it."""

    run: Run
    watch: Watch | None
    context: contextvars.Context
    changes: int


class RunQueue:
    """Starts runs on engines, one at a time.

    Args:
        engines: Where.
        changes: Of the notebook, for the engines.
        last_run: The newest run of this kernel.
        note_run: Called with a run when it starts.
        where: Returns the stacks of all ranks.
    """

    def __init__(
        self, engines: Engines, changes: NotebookChanges, last_run: Callable[[], Run | None],
        note_run: Callable[[Run], None], where: Callable[[], Where],
    ) -> None:  # fmt: skip
        self._engines = engines
        self._changes = changes
        self._last_run = last_run
        self._note_run = note_run
        self._where = where
        self._run: Run | None = None
        self._waiting: collections.deque[_QueuedRun] = collections.deque()
        self._queueing = threading.Lock()  # guards the two above; never held while waiting for engines
        self._segment_cache = SegmentCache(engines.anchor)
        self._checks = KnownChecks()

    @property
    def busy(self) -> bool:
        """Whether a run is running or waits."""
        with self._queueing:
            return self._is_busy()

    def _is_busy(self) -> bool:
        return bool(self._waiting) or (self._run is not None and not self._run.ended)

    @property
    def computing(self) -> bool:
        """Whether the engines are training a run."""
        return self.current is not None

    @property
    def current(self) -> Run | None:
        """The run that the engines are training, from the moment it left the queue."""
        run = self._run
        return run if run is not None and run.progress.running else None

    @property
    def queued(self) -> list[Run]:
        """The waiting runs, first one next."""
        with self._queueing:
            return [queued.run for queued in self._waiting]

    def refuse_while_busy(self) -> None:
        """Raise `ClusterError` if a run is running or waits."""
        with self._queueing:
            run, waiting = self._run, [queued.run for queued in self._waiting]
        if waiting:
            run = waiting[-1]
            raise ClusterError(f"run {run.run_id} is queued: wait for it (run.wait()) or stop it (run.stop()).")
        if run is not None and not run.ended:
            raise ClusterError(f"run {run.run_id} is running: wait for it (run.wait()) or stop it (run.stop()).")

    def add(
        self, model: Any, data: Any, names: tuple[str, str], options: dict[str, Any],
        watch: Watch | None, attended: bool,
    ) -> Run:  # fmt: skip
        """Start a run, or queue it behind those before it; see `Cluster.train`.

        Raises:
            NbdistError: It cannot start.
        """
        check_known(options, TRAIN_OPTIONS | RUN_OPTIONS)
        engines, given = self._engines, {name: value for name, value in options.items() if value is not None}
        on_trouble = {name: given.pop(name) for name in RUN_OPTIONS if name in given}
        check_run_options(on_trouble)  # before the model is looked at
        task, plan_options = Task.of_options(model, data, given, names=names)
        cores = engines.threads * engines.size
        plan = Plan.create(ranks=engines.size, cores=cores, **plan_options)
        # A detached run goes on without a notebook.
        here = attended and engines.anchor is None and not task.in_file
        function, task = task.each_epoch, replace(task, each_epoch=None) if here else task
        spec = RunSpec(
            run_id=new_run_id(), task=task, plan=plan, names=names, options=plan_options, cores=cores,
            title=f"{'rehearsal of ' * plan.rehearse}{task.title}", **on_trouble,
        )  # fmt: skip
        if task.in_file and engines.anchor is not None:
            raise TaskError(
                f"{names[0]} builds a model whose weights lie in a file of this kernel, but with --detach a run "
                "continues without it: start the cluster without --detach."
            )
        check_extra_states(task.model, plan)
        check_hooks(task.model, task.optimizers.values(), plan.mesh)
        calls = None
        if function is not None and here and engines.store is not None:
            requests = EpochRequests(engines.store, spec.run_id, lambda payload: engines.payloads.open(payload, 0))
            calls = EpochCalls(task, function, plan.each_epoch, requests, restores=plan.rehearse)
        return self._enqueue(spec, {"model": model, "data": data, "names": names, **options}, watch, calls)

    def predict(
        self, model: Any, data: Any, names: tuple[str, str], options: dict[str, Any],
        while_waiting: Callable[[Run], None] = lambda run: None,
    ) -> Any:  # fmt: skip
        """Predict in the foreground; see `Cluster.predict`.

        Raises:
            NbdistError: It cannot start, or has failed.
        """
        check_known(options, PREDICT_OPTIONS)
        self._engines.check_alive()
        self.refuse_while_busy()
        engines, given = self._engines, {name: value for name, value in options.items() if value is not None}
        task = prediction_task(model, data, batch_size=given.pop("batch_size", None), names=names)
        cores = engines.threads * engines.size
        plan_options = {**given, **task.options, "check": "no"}
        plan = Plan.create(ranks=engines.size, cores=cores, **plan_options)
        spec = RunSpec(
            run_id=new_run_id(), task=task, plan=plan, title=f"prediction of {task.title}", names=names,
            options=plan_options, cores=cores, predicts=True,
        )  # fmt: skip
        with interrupts.collected() as came:  # one meanwhile would leave the run unattended
            run = self._enqueue(spec, {}, None)
        try:
            attend(run, lambda: while_waiting(run), len(came))
        finally:
            while_waiting(run)
        outputs, run.control.outputs = run.control.outputs, None
        return outputs

    def _enqueue(
        self, spec: RunSpec, arguments: dict[str, Any], watch: Watch | None, calls: EpochCalls | None = None
    ) -> Run:
        """Start a run, or queue it."""
        engines, plan = self._engines, spec.plan
        ranks = {r.rank: RankState(rank=r.rank, host=r.host, device=r.device) for r in engines.records()}
        progress = RunState(title=spec.title, plan=plan.to_dict(), ranks=ranks)
        run = Run(RunControl(spec, progress, self._give_command, arguments, self.predict))
        run.control.epoch_calls = calls
        queued = _QueuedRun(run, watch, contextvars.copy_context(), self._changes.look())
        with self._queueing:
            before, waits = self._run, self._is_busy()
            if waits:
                progress.wait_in_queue()
                self._waiting.append(queued)
            else:
                self._run = run
        if waits:
            draw(watch, run)
            return run
        try:
            self._start(queued)
        except BaseException:
            with self._queueing:
                self._run = before
            self._next()  # runs that were queued behind it meanwhile
            raise
        return run

    def end(self) -> None:
        """The engines end: waiting runs never start."""
        for run in self.queued:
            self._dequeue(run.control, "the engines were stopped before it could start")

    def _start(self, queued: _QueuedRun) -> None:
        """Send the task to every engine and start its monitor thread."""
        engines, run, control = self._engines, queued.run, queued.run.control
        replaced = self._make_ready()
        if control.spec.plan.mesh.size != engines.size:  # the cluster was scaled while it waited
            control.resize(engines.size)
        last = self._last_run()
        plan, snapshot_store = resumed(control.spec.plan, control.spec.task, None if last is None else last.control)
        task = control.spec.task
        if task is not None and plan.check != "no":
            plan = replace(plan, checked=self._checks.find(task, plan))
            self._checks.add(task, plan, run.progress)
        control.use_plan(plan)
        if plan.checkpoint:
            check_no_live_writer(plan.checkpoint, run.run_id)
        dispatch = RunDispatch(control, engines, self._segment_cache, self._changes, queued.changes)
        from_snapshot = snapshot_store is not None
        if snapshot_store is not None:
            snapshot_store.grow(engines.size)
        elif control.spec.trains:
            own = engines.share_memory
            snapshot_store = SnapshotStore(engines.size, engines.anchor) if own else HostSnapshots(engines)
        control.keep_snapshots(snapshot_store)
        if control.arguments and task is not None:
            control.start = last.control.start if from_snapshot and last is not None else keep_start(task)
        control.begin()
        calls = dispatch.start(from_snapshot=from_snapshot)
        if replaced:
            were = "was" if len(replaced) == 1 else "were"
            run.progress.note(f"{ranks_text(replaced)} had been lost and {were} replaced", "lost")
        if control.spec.trains:
            self._note_run(run)
        self._monitor(run, dispatch, calls, queued.watch, queued.context)

    def _make_ready(self) -> list[int]:
        """Replace the engines that are lost, also meanwhile, and form a world of all; returns their ranks.

        No cells are replayed on new ones: a run sends all that it needs.
        """
        engines, replaced = self._engines, set[int]()
        for tries_left in reversed(range(_TRIES)):
            engines.check_alive()
            replaced.update(engines.replace_lost())
            try:
                engines.ensure_ready()
                break
            except ClusterError:
                if not (tries_left and engines.lost):
                    raise
        return sorted(replaced)

    def _monitor(
        self, run: Run, dispatch: RunDispatch, calls: list[Any], watch: Watch | None, context: contextvars.Context
    ) -> None:
        """Start the thread that follows a run which the engines train."""
        RunMonitor(run, dispatch, calls, where=self._where, watch=watch, on_end=self._next, context=context).start()

    def take_over(self, namespace: dict[str, Any], watch: Watch | None) -> Run | None:
        """Monitor the run that another kernel started, or load its result if it has ended; see `take_over`."""
        taken = take_over(self._engines, namespace, self._give_command, self._segment_cache, self._changes)
        if taken is None:
            return None
        dispatch, boards = taken
        self._run = run = Run(dispatch.control)
        self._note_run(run)
        if boards is not None:
            self._monitor(run, dispatch, dispatch.take_over(boards), watch, contextvars.copy_context())
        return run

    def _next(self) -> None:
        """Start the next run of the queue that can start; called when a run has ended."""
        while True:
            with self._queueing:
                if not self._waiting:
                    return
                queued = self._waiting.popleft()
                self._run = queued.run
                queued.run.progress.begin()  # not the control's: a stop may hold its lock, and wait for ours
            try:
                self._start(queued)
                return
            except Exception as error:  # of any kind: `Run.wait` must return
                known = error if isinstance(error, NbdistError) else ClusterError(f"the run could not start: {error!r}")
                queued.run.control.end("failed", known)
                draw(queued.watch, queued.run)
                queued.run.control.release()

    def _give_command(self, control: RunControl, kind: str, value: Any) -> None:
        if kind == "stop":
            if self._dequeue(control):
                return
            control.progress.stop()
        if kind == "scale":
            control.want(0 if value == self._engines.size else value)
        commands = self._engines.commands(control.spec.run_id)
        if commands is not None:
            with contextlib.suppress(PeerLostError):  # the store has ended: so does the run, whose error says why
                commands.append(kind, value)

    def _dequeue(self, control: RunControl, note: str = "") -> bool:
        """End a run that is still in the queue; returns whether it was."""
        with self._queueing:
            queued = next((queued for queued in self._waiting if queued.run.control is control), None)
            if queued is None:
                return False
            self._waiting.remove(queued)
        if note:
            control.progress.note(note)
        control.end("stopped")
        draw(queued.watch, queued.run)
        control.release()
        return True

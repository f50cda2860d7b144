"""The run queue of a cluster: one run at a time, the others wait."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdist.cluster.diagnose.hangs import Hangs
from nbdist.cluster.diagnose.where import Where
from nbdist.cluster.engines.engines import Engines
from nbdist.cluster.runs.dispatch import RunDispatch
from nbdist.cluster.runs.monitor import RunMonitor, draw
from nbdist.cluster.runs.reattach import take_over
from nbdist.cluster.runs.replan import Replan
from nbdist.cluster.runs.resume import resumed
from nbdist.cluster.runs.run import ON_FAILURE, Run, RunHandoff
from nbdist.core.state.checkpoint_writer import check_no_live_writer
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.core.sync.gradient_hooks import check_hooks
from nbdist.core.task.task import Task
from nbdist.core.transfer.payload import SegmentCache
from nbdist.engine.cell_sources import CellSources
from nbdist.errors import ClusterError, NbdistError, PeerLostError, PlanError, ranks_text, suggest
from nbdist.plan import Plan
from nbdist.plan.plan import OPTIONS
from nbdist.telemetry import RankState, RunState
from nbdist.telemetry.record import new_run_id

__all__ = ["RunQueue"]

_TASK_OPTIONS = ("loss", "step", "optimizer", "lr", "lr_scheduler", "val", "metric", "batch_size", "shuffle")


@dataclass(frozen=True)
class _QueuedRun:
    """A run that has not started, and what its start needs."""

    run: Run
    task: Any
    plan: Plan
    watch: Callable[[Run], None] | None
    names: tuple[str, str]
    hangs: Hangs
    context: contextvars.Context


class RunQueue:
    """Starts runs on engines, one at a time.

    Args:
        engines: Where.
        sources: The notebook cells that were sent to the engines.
        last_run: The newest run of this kernel.
        note_run: Called with a run when it starts.
    """

    def __init__(
        self, engines: Engines, sources: CellSources, last_run: Callable[[], Run | None],
        note_run: Callable[[Run], None],
    ) -> None:  # fmt: skip
        self._engines = engines
        self._sources = sources
        self._last_run = last_run
        self._note_run = note_run
        self._run: Run | None = None
        self._waiting: collections.deque[_QueuedRun] = collections.deque()
        self._queueing = threading.Lock()  # guards the two above; never held while waiting for engines
        self._segment_cache: Any = None

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
        watch: Callable[[Run], None] | None, hangs: Hangs, on_failure: str,
    ) -> Run:  # fmt: skip
        """Start a run, or queue it behind those before it; see `Cluster.train`.

        Raises:
            NbdistError: It cannot start.
        """
        for name in options:
            if name not in OPTIONS and name not in _TASK_OPTIONS:
                raise PlanError(f"unknown option {name!r}.{suggest(name, [*OPTIONS, *_TASK_OPTIONS])}")
        if on_failure not in ON_FAILURE:
            raise PlanError(
                f"unknown on_failure {on_failure!r}: use {', '.join(ON_FAILURE)}.{suggest(str(on_failure), ON_FAILURE)}"
            )
        hang_timeout, on_hang = hangs.options
        arguments = dict(
            model=model, data=data, names=names, hang_timeout=hang_timeout, on_hang=on_hang, on_failure=on_failure,
            **options,
        )  # fmt: skip
        task = Task.create(model, data, names=names, **{n: options[n] for n in _TASK_OPTIONS if n in options})
        rest = {name: value for name, value in options.items() if name not in _TASK_OPTIONS}
        size, cores = self._engines.size, self._engines.threads * self._engines.size
        plan = Plan.create(ranks=size, cores=cores, **{**rest, **task.options})
        check_hooks(task.model, task.optimizer, plan.mesh)
        replan = Replan({**rest, **task.options}, cores)
        ranks = {r.rank: RankState(rank=r.rank, host=r.host, device=r.device) for r in self._engines.records()}
        progress = RunState(title=task.title, plan=plan.to_dict(), ranks=ranks)
        run = Run(new_run_id(), plan, progress, self._give_command, arguments, replan, on_failure)
        queued = _QueuedRun(run, task, plan, watch, names, hangs, contextvars.copy_context())
        with self._queueing:
            before, waits = self._run, self._is_busy()
            if waits:
                progress.state = "queued"
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
            self._dequeue(run, "the engines were stopped before it could start")

    def _start(self, queued: _QueuedRun) -> None:
        """Send the task to every engine and start its monitor thread."""
        engines, run = self._engines, queued.run
        engines.check_alive()
        replaced = engines.replace_lost()  # no cells are replayed there: a run sends all that it needs
        if replaced:
            self._sources.sent.clear()
        engines.ensure_ready()
        plan = queued.plan
        if plan.mesh.size != engines.size and run.replan is not None:  # the cluster was scaled while it waited
            plan = run.replan.of(plan, engines.size)
            run.stand_on(plan)
        plan, snapshot_store = resumed(plan, queued.task, self._last_run())
        if plan.checkpoint:
            check_no_live_writer(plan.checkpoint, run.run_id)
        self._segment_cache = self._segment_cache or SegmentCache(engines.anchor)
        what = f"{queued.names[0]} or {queued.names[1]}"
        packed = engines.exchange.pack((queued.task, plan), name=what, segment_cache=self._segment_cache)
        from_snapshot = snapshot_store is not None
        if from_snapshot:
            snapshot_store.grow(engines.size)
        elif engines.exchange.shares_memory:
            snapshot_store = SnapshotStore(engines.size, engines.anchor)
        run.snapshot_store = snapshot_store
        with run.changing:
            run.progress.begin()
        handoff = RunHandoff(
            run_id=run.run_id, payload=packed[0], names=queued.names, title=run.progress.title,
            hangs=queued.hangs.options, replan=run.replan, on_failure=run.on_failure,
        )  # fmt: skip
        dispatch = RunDispatch(run, engines, queued.task, plan, packed, self._segment_cache, self._sources, handoff)
        calls = dispatch.start(from_snapshot=from_snapshot)
        monitor = RunMonitor(
            dispatch, calls, hangs=queued.hangs, watch=queued.watch, on_end=self._next, context=queued.context
        )
        if replaced:
            run.progress.note(f"{ranks_text(replaced)} had been lost and was replaced", "lost")
        self._note_run(run)
        monitor.start()

    def take_over(
        self, namespace: dict[str, Any], watch: Callable[[Run], None] | None, where: Callable[[], Where]
    ) -> Run | None:
        """Monitor the run that another kernel started, or load its result if it has ended; see `take_over`."""
        self._segment_cache = SegmentCache(self._engines.anchor)
        taken = take_over(self._engines, namespace, self._give_command, self._segment_cache, self._sources)
        if taken is None:
            return None
        dispatch, handoff, boards = taken
        self._run = run = dispatch.run
        self._note_run(run)
        if boards is not None:
            calls, hangs = dispatch.take_over(boards), Hangs(*handoff.hangs, where)
            context = contextvars.copy_context()
            RunMonitor(dispatch, calls, hangs=hangs, watch=watch, on_end=self._next, context=context).start()
        return run

    def _next(self) -> None:
        """Start the next run of the queue that can start; called when a run has ended."""
        while True:
            with self._queueing:
                if not self._waiting:
                    return
                queued = self._waiting.popleft()
                self._run = queued.run
                queued.run.progress.begin()
            try:
                self._start(queued)
                return
            except Exception as error:  # of any kind: `Run.wait` must return
                known = error if isinstance(error, NbdistError) else ClusterError(f"the run could not start: {error!r}")
                queued.run._end("failed", known)
                draw(queued.watch, queued.run)
                queued.run._release()

    def _give_command(self, run: Run, kind: str, value: Any) -> None:
        if kind == "stop":
            if self._dequeue(run):
                return
            run.progress.state = "stopping"
        if kind == "scale":
            run.wanted = 0 if value == self._engines.size else value
        commands = self._engines.commands(run.run_id)
        if commands is not None:
            with contextlib.suppress(PeerLostError):  # the store has ended: so does the run, whose error says why
                commands.append(kind, value)

    def _dequeue(self, run: Run, note: str = "") -> bool:
        """End a run that is still in the queue; returns whether it was."""
        with self._queueing:
            queued = next((queued for queued in self._waiting if queued.run is run), None)
            if queued is None:
                return False
            self._waiting.remove(queued)
        if note:
            run.progress.note(note)
        run._end("stopped")
        draw(queued.watch, run)
        run._release()
        return True

"""The trainings of one cluster: one goes on, the others wait for their turn."""

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
from nbdist.core.state.checkpoint_writer import check_free
from nbdist.core.state.snapshot import SnapshotStore
from nbdist.core.sync.gradient_hooks import check_hooks
from nbdist.core.task.task import Task
from nbdist.core.transfer.payload import SegmentCache, pack
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
    """A run that has yet to begin, and what it needs for that."""

    run: Run
    task: Any
    plan: Plan
    watch: Callable[[Run], None] | None
    names: tuple[str, str]
    hangs: Hangs
    context: contextvars.Context


class RunQueue:
    """Begins trainings on engines, one at a time.

    Args:
        engines: Where.
        sources: The cells of the notebook that the engines know.
        last_run: The newest run of this kernel.
        note_run: Called with a run when it begins.
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
        self._queueing = threading.Lock()  # held to look at the two above, and never while engines are waited for
        self._segment_cache: Any = None

    @property
    def busy(self) -> bool:
        """Whether a run goes on or waits."""
        with self._queueing:
            return self._is_busy()

    def _is_busy(self) -> bool:
        return bool(self._waiting) or (self._run is not None and not self._run.ended)

    @property
    def computing(self) -> bool:
        """Whether the engines work on a run at the moment."""
        return self.current is not None

    @property
    def current(self) -> Run | None:
        """The run that the engines work on, from when its turn has come."""
        run = self._run
        return run if run is not None and run.progress.running else None

    @property
    def queued(self) -> list[Run]:
        """The runs that wait, in their order."""
        with self._queueing:
            return [turn.run for turn in self._waiting]

    def refuse_while_busy(self) -> None:
        """Raise `ClusterError` where a run goes on or waits."""
        with self._queueing:
            run, waiting = self._run, [turn.run for turn in self._waiting]
        if waiting:
            run = waiting[-1]
            raise ClusterError(f"run {run.run_id} is queued: wait for it (run.wait()) or stop it (run.stop()).")
        if run is not None and not run.ended:
            raise ClusterError(f"run {run.run_id} is going on: wait for it (run.wait()) or stop it (run.stop()).")

    def add(
        self, model: Any, data: Any, names: tuple[str, str], options: dict[str, Any],
        watch: Callable[[Run], None] | None, hangs: Hangs, on_failure: str,
    ) -> Run:  # fmt: skip
        """Begin a run, or let it wait until those before it have ended; see `Cluster.train`.

        Raises:
            NbdistError: It cannot begin.
        """
        for name in options:
            if name not in OPTIONS and name not in _TASK_OPTIONS:
                raise PlanError(f"unknown option {name!r}.{suggest(name, [*OPTIONS, *_TASK_OPTIONS])}")
        if on_failure not in ON_FAILURE:
            raise PlanError(
                f"unknown on_failure {on_failure!r}: use {', '.join(ON_FAILURE)}.{suggest(str(on_failure), ON_FAILURE)}"
            )
        hang_timeout, on_hang = hangs.asked
        asked = dict(
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
        run = Run(new_run_id(), plan, progress, self._give_command, asked, replan, on_failure)
        turn = _QueuedRun(run, task, plan, watch, names, hangs, contextvars.copy_context())
        with self._queueing:
            before, waits = self._run, self._is_busy()
            if waits:
                progress.state = "queued"
                self._waiting.append(turn)
            else:
                self._run = run
        if waits:
            draw(watch, run)
            return run
        try:
            self._begin(turn)
        except BaseException:
            with self._queueing:
                self._run = before
            self._next()  # what came to wait for it meanwhile
            raise
        return run

    def end(self) -> None:
        """The engines end: what waits will never begin."""
        for run in self.queued:
            self._leave(run, "the engines were stopped before it could begin")

    def _begin(self, turn: _QueuedRun) -> None:
        """Send a task to every engine and follow it to its end, in a thread."""
        engines, run = self._engines, turn.run
        engines.check_alive()
        replaced = engines.replace_lost()  # a training brings with it all that it needs
        if replaced:
            self._sources.sent.clear()
        engines.ensure_ready()
        plan = turn.plan
        if plan.mesh.size != engines.size and run.replan is not None:  # there were others when it was asked for
            plan = run.replan.of(plan, engines.size)
            run.stand_on(plan)
        plan, snapshot_store = resumed(plan, turn.task, self._last_run())
        if plan.checkpoint:
            check_free(plan.checkpoint, run.run_id)
        self._segment_cache = self._segment_cache or SegmentCache(engines.anchor)
        what = f"{turn.names[0]} or {turn.names[1]}"
        packed = pack((turn.task, plan), name=what, inline=engines.remote, segment_cache=self._segment_cache)
        from_snapshot = snapshot_store is not None
        if from_snapshot:
            snapshot_store.grow(engines.size)
        elif not engines.remote:
            snapshot_store = SnapshotStore(engines.size, engines.anchor)
        run.snapshot_store = snapshot_store
        with run.changing:
            run.progress.begin()
        handoff = RunHandoff(
            run_id=run.run_id, payload=packed[0], names=turn.names, title=run.progress.title, hangs=turn.hangs.asked,
            replan=run.replan, on_failure=run.on_failure,
        )  # fmt: skip
        dispatch = RunDispatch(run, engines, turn.task, plan, packed, self._segment_cache, self._sources, handoff)
        calls = dispatch.begin(from_snapshot=from_snapshot)
        monitor = RunMonitor(dispatch, calls, hangs=turn.hangs, watch=turn.watch, then=self._next, context=turn.context)
        if replaced:
            run.progress.note(f"{ranks_text(replaced)} had been lost and was replaced", "lost")
        self._note_run(run)
        monitor.start()

    def take_over(
        self, namespace: dict[str, Any], watch: Callable[[Run], None] | None, where: Callable[[], Where]
    ) -> Run | None:
        """Go on following the run that another kernel has begun, or bring home what it has left; see `take_over`."""
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
            RunMonitor(dispatch, calls, hangs=hangs, watch=watch, then=self._next, context=context).start()
        return run

    def _next(self) -> None:
        """A run has ended: begin the next one that can."""
        while True:
            with self._queueing:
                if not self._waiting:
                    return
                turn = self._waiting.popleft()
                self._run = turn.run
                turn.run.progress.begin()
            try:
                self._begin(turn)
                return
            except Exception as error:  # whatever it is, nobody waits for ever
                known = error if isinstance(error, NbdistError) else ClusterError(f"the run could not begin: {error!r}")
                turn.run._end("failed", known)
                draw(turn.watch, turn.run)
                turn.run._release()

    def _give_command(self, run: Run, kind: str, value: Any) -> None:
        if kind == "stop":
            if self._leave(run):
                return
            run.progress.state = "stopping"
        if kind == "scale":
            run.wanted = 0 if value == self._engines.size else value
        commands = self._engines.commands(run.run_id)
        if commands is not None:
            with contextlib.suppress(PeerLostError):  # the store has just ended, and so does the run, which says why
                commands.give(kind, value)

    def _leave(self, run: Run, note: str = "") -> bool:
        """Take a run out of the queue; returns whether it was there."""
        with self._queueing:
            turn = next((turn for turn in self._waiting if turn.run is run), None)
            if turn is None:
                return False
            self._waiting.remove(turn)
        if note:
            run.progress.note(note)
        run._end("stopped")
        draw(turn.watch, run)
        run._release()
        return True

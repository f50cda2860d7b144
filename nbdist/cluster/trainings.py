"""The trainings of one cluster: one goes on, the others wait for their turn."""

from __future__ import annotations

import collections
import contextvars
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbdist.cluster import current
from nbdist.cluster.begun import Begun
from nbdist.cluster.definitions import CellSources
from nbdist.cluster.engines import Engines
from nbdist.cluster.hangs import Hangs
from nbdist.cluster.packing import pack
from nbdist.cluster.ready import make_ready
from nbdist.cluster.relay import Relay
from nbdist.cluster.replan import Replan
from nbdist.cluster.resuming import resumed
from nbdist.cluster.run import ON_FAILURE, Run
from nbdist.cluster.taking_over import take_over
from nbdist.cluster.training import Training
from nbdist.cluster.where import Where
from nbdist.errors import ClusterError, NbdistError, PlanError, ranks_text, suggest
from nbdist.plan import Plan
from nbdist.plan.plan import OPTIONS
from nbdist.telemetry import RankState, RunState
from nbdist.telemetry.record import new_run_id

__all__ = ["Trainings"]

_TASK_OPTIONS = ("loss", "step", "optimizer", "lr", "lr_scheduler", "val", "metric", "batch_size", "shuffle")


@dataclass(frozen=True)
class _Turn:
    """A run that has yet to begin, and what it needs for that."""

    run: Run
    task: Any
    plan: Plan
    watch: Callable[[Run], None] | None
    names: tuple[str, str]
    hangs: Hangs
    context: contextvars.Context


class Trainings:
    """Begins trainings on engines, one at a time.

    Args:
        engines: Where.
        sources: The cells of the notebook that the engines know.
    """

    def __init__(self, engines: Engines, sources: CellSources) -> None:
        self._engines = engines
        self._sources = sources
        self._run: Run | None = None
        self._waiting: collections.deque[_Turn] = collections.deque()
        self._changing = threading.RLock()
        self._outbox: Any = None

    @property
    def busy(self) -> bool:
        """Whether a run goes on or waits."""
        return bool(self._waiting) or (self._run is not None and not self._run.ended)

    @property
    def computing(self) -> bool:
        """Whether the engines work on a run at the moment."""
        return self._run is not None and self._run.progress.running

    @property
    def current(self) -> Run | None:
        """The run that the engines work on."""
        return self._run if self.computing else None

    @property
    def queued(self) -> list[Run]:
        """The runs that wait, in their order."""
        return [turn.run for turn in self._waiting]

    def refuse_while_busy(self) -> None:
        """Raise `ClusterError` where a run goes on or waits."""
        if self._waiting:
            run = self._waiting[-1].run
            raise ClusterError(f"run {run.run_id} is queued: wait for it (run.wait()) or stop it (run.stop()).")
        if self._run is not None and not self._run.ended:
            raise ClusterError(f"run {self._run.run_id} is going on: wait for it (run.wait()) or stop it (run.stop()).")

    def add(
        self, model: Any, data: Any, names: tuple[str, str], options: dict[str, Any],
        watch: Callable[[Run], None] | None, hangs: Hangs, on_failure: str,
    ) -> Run:  # fmt: skip
        """Begin a run, or let it wait until those before it have ended; see `Cluster.train`.

        Raises:
            NbdistError: It cannot begin.
        """
        from nbdist.core.task import Task

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
        replan = Replan({**rest, **task.options}, cores)
        ranks = {r.rank: RankState(rank=r.rank, host=r.host, device=r.device) for r in self._engines.records()}
        progress = RunState(title=task.title, plan=plan.to_dict(), ranks=ranks)
        run = Run(new_run_id(), plan, progress, self._order, asked, replan, on_failure)
        turn = _Turn(run, task, plan, watch, names, hangs, contextvars.copy_context())
        with self._changing:
            if not self.busy:
                self._begin(turn)
                return run
            progress.state = "queued"
            self._waiting.append(turn)
        _draw(turn)
        return run

    def end(self) -> None:
        """The engines end: what waits will never begin."""
        while self._waiting:
            self._leave(self._waiting[0].run, "the engines were stopped before it could begin")

    def _begin(self, turn: _Turn) -> None:
        """Send a task to every engine and follow it to its end, in a thread."""
        from nbdist.core.checkpoint import check_free
        from nbdist.core.handover import Outbox
        from nbdist.core.snapshot import Vaults

        engines, run = self._engines, turn.run
        engines.check_alive()
        replaced = engines.replace_lost()  # a training brings with it all that it needs
        if replaced:
            self._sources.sent.clear()
        make_ready(engines)
        plan = turn.plan
        if plan.mesh.size != engines.size and run.replan is not None:  # there were others when it was asked for
            plan = run.replan.of(plan, engines.size)
            run.stand_on(plan)
        plan, vaults = resumed(plan, turn.task, current.last_run())
        if plan.checkpoint:
            check_free(plan.checkpoint, run.run_id)
        self._outbox = self._outbox or Outbox(engines.anchor)
        what = f"{turn.names[0]} or {turn.names[1]}"
        packed = pack((turn.task, plan), what, inline=engines.remote, outbox=self._outbox)
        go_on = vaults is not None
        if go_on:
            vaults.grow(engines.size)
        elif not engines.remote:
            vaults = Vaults(engines.size, engines.anchor)
        run.vaults = vaults
        run.progress.begin()
        begun = Begun(
            run_id=run.run_id, parcel=packed[0], names=turn.names, title=run.progress.title, hangs=turn.hangs.asked,
            replan=run.replan, on_failure=run.on_failure,
        )  # fmt: skip
        training = Training(run, engines, turn.task, plan, packed, self._outbox, self._sources, begun)
        calls = training.begin(go_on=go_on)
        relay = Relay(training, calls, hangs=turn.hangs, watch=turn.watch, then=self._next, context=turn.context)
        if replaced:
            run.progress.note(f"{ranks_text(replaced)} had been lost and was replaced", "lost")
        self._run = run
        current.note_run(run)
        relay.start()

    def take_over(
        self, namespace: dict[str, Any], watch: Callable[[Run], None] | None, where: Callable[[], Where]
    ) -> Run | None:
        """Go on following the run that another kernel has begun, or bring home what it has left; see `take_over`."""
        from nbdist.core.handover import Outbox

        self._outbox = Outbox(self._engines.anchor)
        taken = take_over(self._engines, namespace, self._order, self._outbox, self._sources)
        if taken is None:
            return None
        training, begun, boards = taken
        self._run = run = training.run
        current.note_run(run)
        if boards is not None:
            calls, hangs = training.take_over(boards), Hangs(*begun.hangs, where)
            context = contextvars.copy_context()
            Relay(training, calls, hangs=hangs, watch=watch, then=self._next, context=context).start()
        return run

    def _next(self) -> None:
        """A run has ended: begin the next one that can."""
        with self._changing:
            while self._waiting:
                turn = self._waiting.popleft()
                try:
                    self._begin(turn)
                    return
                except NbdistError as error:
                    turn.run._end("failed", error)
                    _draw(turn)
                    turn.run._release()

    def _order(self, run: Run, kind: str, value: Any) -> None:
        if kind == "stop":
            with self._changing:
                if any(turn.run is run for turn in self._waiting):
                    self._leave(run)
                    return
            run.progress.state = "stopping"
        if kind == "scale":
            run.wanted = value
        self._engines.order(run.run_id, kind, value)

    def _leave(self, run: Run, note: str = "") -> None:
        """Take a run out of the queue."""
        with self._changing:
            turn = next(turn for turn in self._waiting if turn.run is run)
            self._waiting.remove(turn)
        if note:
            run.progress.note(note)
        run._end("stopped")
        _draw(turn)
        run._release()


def _draw(turn: _Turn) -> None:
    if turn.watch is not None:
        turn.watch(turn.run)

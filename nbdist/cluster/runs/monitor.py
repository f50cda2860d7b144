"""The monitor: follows a training to its end. It carries snapshots to a Run, and begins anew where a rank is lost."""

from __future__ import annotations

import concurrent.futures
import contextlib
import contextvars
import dataclasses
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

import ipyparallel.error

from nbdist.cluster.cells.cell_run import settle
from nbdist.cluster.diagnose.hangs import Hangs
from nbdist.cluster.runs.dispatch import RunDispatch
from nbdist.cluster.runs.late_commands import late_command_text
from nbdist.cluster.runs.run import Run
from nbdist.engine.failure import LOST, PROCESS_ENDED, Failure, as_error
from nbdist.engine.outcome import Outcome
from nbdist.errors import ClusterError, EngineError, NbdistError, PlanError, ranks_text
from nbdist.telemetry import Event, JsonlSink, Noted, Recovered
from nbdist.telemetry.record import cluster_record_path

__all__ = ["RunMonitor", "draw"]

_INTERVAL_S = 0.2  # as often as ranks tell
_NOT_ENOUGH = "what runs there, or its memory, does not suffice"
_INTERRUPT_AFTER_S = 0.8
"""How long ranks may take to notice that a peer is gone, before they are interrupted."""
_KILL_AFTER_S = 2.0
"""How long they may then take to react, before they are replaced like one that is lost."""
_TRIES = 5
"""How often in succession ranks may be lost before the run has got any further."""


class RunMonitor:
    """A thread that follows one training on the engines.

    Args:
        training: Which.
        calls: ipyparallel's result of each rank, which has begun.
        hangs: Looks for hangs.
        watch: Called with the run after each update; the last time after its end.
        then: Called when all about the end is done.
        context: Carries which cell output belongs to: some ipykernels fail in a thread without it.
    """

    def __init__(
        self, dispatch: RunDispatch, calls: list[Any], *, hangs: Hangs, watch: Callable[[Run], None] | None,
        then: Callable[[], None], context: contextvars.Context,
    ) -> None:  # fmt: skip
        self._training = dispatch
        self._run = dispatch.run
        self._engines = dispatch.engines
        self._hangs = hangs
        self._hung: EngineError | None = None  # of a run that ends for it
        self._why = PROCESS_ENDED
        self._watch = watch
        self._freed: set[int] = set()
        self._reached, self._tries = -1, 0
        self._then = then
        self._calls = calls
        self._thread = threading.Thread(target=context.run, args=(self._follow,), daemon=True, name="nbdist-monitor")

    def start(self) -> None:
        """Start following."""
        self._thread.start()

    def _follow(self) -> None:
        run = self._run
        failed = True
        try:
            while self._is_lost(outcomes := self._collect()) or all(o.state == "scaled" for o in outcomes):
                self._go_on(outcomes)
            failed = self._end(outcomes)
        except NbdistError as error:
            run._end("failed", self._rescued(error))
        except Exception as error:  # a defect of ours must not leave a user waiting for ever
            run._end("failed", ClusterError(f"the run could not be followed to its end: {error!r}"))
            raise
        finally:
            try:
                with contextlib.suppress(ClusterError):
                    self._training.end(failed=failed)
                self._tell_late()
                self._draw()
            finally:
                run._release()  # whatever else goes wrong, nobody waits for ever
                self._then()

    def _end(self, outcomes: list[Outcome]) -> bool:
        """Bring home what there is, and say how it ended; returns whether their world is of no use any more."""
        run = self._run
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        if not failures:
            self._training.load_result(outcomes[0].result)
            run.wanted = run.wanted or outcomes[0].ranks  # asked for in the last step, perhaps by another kernel
            run._end(outcomes[0].state)
        elif run.abandoned:
            step = self._training.rescue()
            if step is not None:
                run.progress.stand_at(step)
            elif run.plan.gather and not run.plan.resume:
                run.progress.stand_at(0)  # it came before the first snapshot: the model is as it was
            run._end("stopped")
        else:
            run._end("failed", self._rescued(self._hung or as_error(failures)))
        return bool(failures or self._freed)

    def _tell_late(self) -> None:
        """Say what has become of what was asked for after the last step; nothing more can be asked for by now."""
        run = self._run
        commands = self._engines.commands(run.run_id)
        left = [] if commands is None else commands.left()
        texts = [late_command_text(command, run, self._engines.size, self._training.refusal) for command in left]
        for text in texts:
            run.progress.note(text)
        if texts:
            self._record(*(Noted(rank=0, text=text) for text in texts))

    def _rescued(self, error: NbdistError) -> NbdistError:
        """The same error, that says what has become of the model."""
        try:
            step = self._training.rescue()
        except NbdistError:
            step = None
        if step is not None:
            self._run.progress.stand_at(step)
            held = f"the model holds the weights after step {step}, from where --resume goes on"
            self._run.progress.note(held)
            error.add(f"{held[0].upper()}{held[1:]}.")
        return error

    def _collect(self) -> list[Outcome]:
        """Merge snapshots until every rank has answered; free the others when one has failed."""
        outcomes: dict[int, Outcome] = {}
        self._freed.clear()
        since_s: float | None = None
        killed = False
        while len(outcomes) < len(self._calls):
            waiting = [rank for rank in range(len(self._calls)) if rank not in outcomes]
            calls = [self._calls[rank] for rank in waiting]
            concurrent.futures.wait(calls, _INTERVAL_S, return_when=concurrent.futures.FIRST_COMPLETED)
            if self._engines.ended:
                raise ClusterError("the engines were stopped while the run was going on.")
            self._engines.check_alive()
            for rank in waiting:
                if self._calls[rank].done():
                    outcomes[rank] = self._outcome(rank)
            waiting = [rank for rank in waiting if rank not in outcomes]
            now_s = time.monotonic()
            if since_s is None and any(outcome.failure for outcome in outcomes.values()):
                since_s = now_s
            if since_s is None and (self._run.abandoned or self._is_hung()):
                since_s = now_s - _INTERRUPT_AFTER_S
            if waiting and since_s is not None and now_s >= since_s + _INTERRUPT_AFTER_S and not self._freed:
                self._freed.update(waiting)
                self._engines.release()  # one whose interrupt came too early to be heard waits at the store
                self._engines.interrupt(waiting)
            if since_s is not None and now_s >= since_s + _INTERRUPT_AFTER_S + _KILL_AFTER_S and not killed:
                killed = True
                self._engines.kill(waiting)
            self._merge(outcomes)
            self._draw()
        return [outcomes[rank] for rank in range(len(self._calls))]

    def _is_hung(self) -> bool:
        """Whether the run hangs and has to end; ranks that can be replaced are ended here, and so are lost."""
        hang = self._hangs.found(self._run.progress)
        if hang is None:
            return False
        self._run.progress.note(hang.text)
        self._record(Noted(rank=0, text=hang.text))
        if hang.culprits:
            self._why = hang.text
            self._engines.kill(hang.culprits)
        else:
            self._hung = EngineError(f"{hang.text}.")
        return self._hung is not None

    def _outcome(self, rank: int) -> Outcome:
        error = self._calls[rank].exception()  # raised, it would hold this frame, and with it the run's memory
        if error is None:
            outcome: Outcome = self._calls[rank].get()
            if outcome.failure is None or not outcome.failure.echo:  # else nobody reads what it has printed at once
                settle(self._calls[rank])
        elif isinstance(error, ipyparallel.error.RemoteError):
            lost = error.ename == "EngineError"  # ipyparallel's word for an engine that died
            failure = Failure.lost(rank) if lost else Failure.reported(rank, error.ename, error.evalue)
            snapshot = dataclasses.replace(self._run.progress.ranks[rank], state="lost" if lost else "failed")
            outcome = Outcome(rank=rank, state="failed", snapshot=snapshot, failure=failure)
        else:
            raise error
        if rank in self._freed and outcome.failure is not None and outcome.failure.kind == "KeyboardInterrupt":
            return dataclasses.replace(outcome, failure=dataclasses.replace(outcome.failure, echo=True))
        return outcome

    def _is_lost(self, outcomes: list[Outcome]) -> bool:
        """Whether the run ended for nothing but that processes did, so that it can go on."""
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        return (
            not (self._run.abandoned or self._hung or self._run.on_failure == "stop")
            and any(failure.kind == LOST for failure in failures)
            and all(failure.echo for failure in failures)
        )

    def _go_on(self, outcomes: list[Outcome]) -> None:
        """Replace the ranks that were lost, or have as many as are wanted; all go on from the newest snapshot.

        Raises:
            ClusterError: Ranks are lost again and again at the same place, or cannot be replaced.
        """
        run, since_s, before = self._run, time.monotonic(), self._engines.size
        lost = [outcome.rank for outcome in outcomes if outcome.failure is not None and outcome.failure.kind == LOST]
        with run.changing:
            run.progress.state = "recovering" if run.progress.state != "stopping" else "stopping"
            run.progress.begin_again()
            # Another number may be asked for meanwhile.
            wanted, run.wanted = run.wanted or max(outcome.ranks for outcome in outcomes), 0
        reached = run.progress.step if run.snapshot_store is None else run.snapshot_store.reached
        if reached > self._reached:  # not just another one: without snapshots it has to come back here first
            self._reached, self._tries = reached, 0
        replaced = set(lost)
        self._show(dict.fromkeys(replaced, "lost"))
        while True:
            self._tries += bool(lost)
            if self._tries >= _TRIES:
                step = max(self._reached, 0) + 1
                raise EngineError(
                    f"{ranks_text(lost)}: the process ended {_TRIES} times at step {step} or before: "
                    f"{_NOT_ENOUGH if self._why == PROCESS_ENDED else self._why}.", rank=lost[0],
                )  # fmt: skip
            try:
                replaced.update(self._engines.lost)
                self._training.gather_ranks(wanted or self._size())
                self._show(dict.fromkeys(replaced, "recovering"))
                step = self._training.kept_step()
                self._calls = self._training.begin(from_snapshot=True, again=True)
                break
            except ClusterError as error:
                if self._engines.ended:
                    raise ClusterError("the engines were stopped while the run was going on.") from error
                self._engines.check_alive()
                if not lost:  # it was asked for: as many as there are will do
                    lost, wanted = self._engines.lost or [0], 0
        self._tell_again(replaced, before, step, time.monotonic() - since_s)

    def _size(self) -> int:
        """How many ranks are to go on: as many as before, or as are left."""
        run, engines = self._run, self._engines
        left = engines.size - len(engines.lost)
        if run.on_failure != "shrink" or run.replan is None or left in (0, engines.size):
            return engines.size
        for size in range(left, 0, -1):
            with contextlib.suppress(PlanError):  # the mesh cannot be laid on so many
                run.replan(size)
                return size
        return engines.size

    def _tell_again(self, replaced: set[int], before: int, step: int, seconds: float) -> None:
        """Tell what became of the ranks, and from where they go on."""
        run, size = self._run, self._engines.size
        lost = f"{ranks_text(replaced)} lost ({self._why}), " if replaced else ""
        became = f"replaced in {seconds:.2f} s" if size == before else f"{size} instead of {before} engines"
        text = f"{lost}{became}; all go on from step {step}"
        self._why = PROCESS_ENDED
        run.progress.note(text, "recovered")
        recovered = [Recovered(rank=rank, step=step, seconds=seconds) for rank in sorted(replaced) if rank < size]
        self._record(*recovered, Noted(rank=0, text=text))

    def _record(self, *events: Event) -> None:
        """Write down what has happened to ranks, which cannot do it themselves."""
        with contextlib.closing(JsonlSink(cluster_record_path(self._run.run_id))) as record:
            for event in events:
                record.emit(event)

    def _show(self, states: dict[int, str]) -> None:
        """Draw what has become of ranks, while the others wait for them."""
        ranks = self._run.progress.ranks
        ranks.update({r: dataclasses.replace(ranks[r], state=states.get(r, "running")) for r in ranks})
        self._draw()

    def _merge(self, outcomes: dict[int, Outcome]) -> None:
        """Take in the newest snapshot of each rank: the last one from its outcome, for published ones may be late."""
        with self._run.changing:
            for rank, call in enumerate(self._calls):
                if rank not in outcomes:
                    for state in self._training.poll_states(rank, call):
                        self._run.progress.merge(state)
                elif (last := outcomes[rank].snapshot) is not None:
                    self._run.progress.merge(last)

    def _draw(self) -> None:
        if not draw(self._watch, self._run):
            self._watch = None


def draw(watch: Callable[[Run], None] | None, run: Run) -> bool:
    """Show a run to who watches it; returns whether that succeeded: a picture must neither end a run nor hold it."""
    try:
        if watch is not None:
            watch(run)
    except Exception as error:
        warnings.warn(f"run {run.run_id} goes on unseen, it cannot be drawn: {error!r}", stacklevel=2)
        return False
    return True

"""The run monitor: a thread that updates a Run from its ranks, detects failures and recovers from lost ranks."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from nbdist.cluster.calls.pending_call import CallError, EngineDied, PendingCall
from nbdist.cluster.cells.cell_run import settle
from nbdist.cluster.diagnose.hangs import Hangs
from nbdist.cluster.diagnose.where import Where
from nbdist.cluster.hosts.host import ALL_LOST
from nbdist.cluster.runs.dispatch import RunDispatch
from nbdist.cluster.runs.late_commands import late_command_text
from nbdist.cluster.runs.record_mirror import RecordMirror
from nbdist.cluster.runs.run import Run
from nbdist.engine.failure import LOST, PROCESS_ENDED, Failure, as_error
from nbdist.engine.train_outcome import Outcome
from nbdist.errors import ClusterError, EngineError, NbdistError, PlanError, ranks_text
from nbdist.segment_path import SegmentGoneError
from nbdist.telemetry import Event, JsonlSink, Noted, Recovered
from nbdist.telemetry.record import cluster_record_path

__all__ = ["RunMonitor", "Watch", "draw"]

Watch = Callable[[Run], None]
"""Called with a run after each update, and once after its end."""

_INTERVAL_S = 0.2  # as often as ranks publish
_PROBABLE_CAUSE = "it runs out of memory, or the code that runs there ends it"
_INTERRUPT_AFTER_S = 0.8
"""How long ranks may take to notice that a peer failed, before they are interrupted."""
_KILL_AFTER_S = 2.0
"""How long they may then take to react, before they are killed and replaced like lost ones."""
_TRIES = 5
"""How often ranks may be lost in succession without progress of the run."""


class RunMonitor:
    """A thread that monitors one run on the engines.

    Args:
        run: The run.
        dispatch: Its dispatch, which has started it.
        calls: The call of `train` on each rank.
        where: Returns the stacks of all ranks.
        watch: Called with the run after each update; the last time after its end.
        on_end: Called when the run has ended completely.
        context: Holds the cell that output belongs to: some ipykernels fail in a thread without it.
    """

    def __init__(
        self, run: Run, dispatch: RunDispatch, calls: list[PendingCall], *, where: Callable[[], Where],
        watch: Watch | None, on_end: Callable[[], None], context: contextvars.Context,
    ) -> None:  # fmt: skip
        self._dispatch = dispatch
        self._run = run
        self._control = run.control
        self._engines = dispatch.engines
        self._hangs = Hangs(run.control.spec.hang_timeout, run.control.spec.on_hang, where)
        self._hang_error: EngineError | None = None  # set where a hang ends the run
        self._loss_reason = PROCESS_ENDED
        self._watch = watch
        self._record_mirror = RecordMirror(dispatch.engines, run.control.spec.run_id)
        self._interrupted: set[int] = set()
        self._noticed, self._saved_before = "", 0  # that hosts end, and how many checkpoints there were by then
        self._last_step, self._tries = -1, 0  # the step at which ranks were lost, and how often
        self._on_end = on_end
        self._calls = calls
        self._result: Any = None  # of the rank that has one, opened
        self._thread = threading.Thread(target=context.run, args=(self._monitor,), daemon=True, name="nbdist-monitor")

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def _monitor(self) -> None:
        control = self._control
        failed = True
        self._engines.end_notice.hold()
        try:
            while self._is_lost(outcomes := self._collect()) or all(o.state == "scaled" for o in outcomes):
                self._recover(outcomes)
            failed = self._end(outcomes)
        except NbdistError as error:
            control.end("failed", self._with_restored_model(error))
        except Exception as error:  # a bug in nbdist must not leave `Run.wait` waiting for ever
            control.end("failed", ClusterError(f"the run's monitor failed: {error!r}"))
            raise
        finally:
            self._engines.end_notice.release()
            try:
                with contextlib.suppress(ClusterError):
                    self._dispatch.end(failed=failed)
                self._report_late_commands()
                self._draw()
            finally:
                control.release()  # `Run.wait` must return, whatever else fails
                self._on_end()

    def _end(self, outcomes: list[Outcome]) -> bool:
        """Load the result and set the run's final state; returns whether the ranks' process group is broken."""
        control = self._control
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        if not failures:
            self._dispatch.load_result(self._result)
            self._result = None
            control.want(control.wanted or outcomes[0].ranks)  # scaled in the last step, perhaps from another kernel
            control.end(outcomes[0].state)
        elif control.abandoned:
            step = self._dispatch.load_newest_snapshot(best=True)
            if step is not None:
                control.progress.set_step(step)
            elif control.spec.plan.gather and not control.spec.plan.resume:
                control.progress.set_step(0)  # stopped before the first snapshot: the model is unchanged
            control.end("stopped")
        else:
            control.end("failed", self._with_restored_model(self._hang_error or as_error(failures)))
        return bool(failures or self._interrupted)

    def _report_late_commands(self) -> None:
        """Note the outcome of each command given after the last step; the ended run refuses new ones."""
        control = self._control
        commands = self._engines.commands(control.spec.run_id)
        left = [] if commands is None else commands.unapplied()
        texts = [
            late_command_text(command, control, self._engines.size, self._dispatch.scale_error) for command in left
        ]
        for text in texts:
            control.progress.note(text)
        if texts:
            self._record(*(Noted(rank=0, text=text) for text in texts))

    def _with_restored_model(self, error: NbdistError) -> NbdistError:
        """Load the newest snapshot into the model; returns the error with a sentence that says so."""
        try:
            step = self._dispatch.load_newest_snapshot()
        except NbdistError:
            step = None
        if step is not None:
            self._control.progress.set_step(step)
            held = f"the model holds the weights after step {step}, from which --resume continues"
            self._control.progress.note(held)
            error.add(f"{held[0].upper()}{held[1:]}.")
        return error

    def _collect(self) -> list[Outcome]:
        """Merge states until every rank has returned; after a failure, interrupt and then kill ranks still waiting."""
        outcomes: dict[int, Outcome] = {}
        self._interrupted.clear()
        failed_s: float | None = None
        killed = False
        returned: queue.SimpleQueue[int] = queue.SimpleQueue()
        for rank, call in enumerate(self._calls):
            call.add_done_callback(functools.partial(lambda rank, call: returned.put(rank), rank))
        while len(outcomes) < len(self._calls):
            ranks = _taken(returned, _INTERVAL_S)
            if self._engines.ended:
                raise ClusterError("the engines were stopped during the run.")
            self._engines.check_alive()
            outcomes |= {rank: self._outcome(rank) for rank in ranks}
            now_s = time.monotonic()
            if failed_s is None and any(outcomes[rank].failure for rank in ranks):
                failed_s = now_s
            if failed_s is None and (self._control.abandoned or self._is_hung()):
                failed_s = now_s - _INTERRUPT_AFTER_S
            if failed_s is not None and now_s >= failed_s + _INTERRUPT_AFTER_S:
                waiting = [rank for rank in range(len(self._calls)) if rank not in outcomes]
                if waiting and not self._interrupted:
                    self._interrupted.update(waiting)
                    self._engines.release()  # a rank may still wait at the store, if its interrupt came too early
                    self._engines.interrupt(waiting)
                if now_s >= failed_s + _INTERRUPT_AFTER_S + _KILL_AFTER_S and not killed:
                    killed = True
                    self._engines.kill(waiting)
            self._save_before_end()
            self._merge(outcomes)
            self._record_mirror.poll()
            self._draw()
        self._record_mirror.finish()
        if not any(outcome.failure for outcome in outcomes.values()):
            source = next((rank for rank, outcome in outcomes.items() if outcome.result is not None), 0)
            try:
                self._result = self._dispatch.open_result(outcomes[source].result, source)
            except ClusterError:  # lost between its last step and now, with what only it had gathered
                outcomes[source] = self._lost_outcome(source)
        return [outcomes[rank] for rank in range(len(self._calls))]

    def _save_before_end(self) -> None:
        """Save a checkpoint before the engines' hosts are taken away, and note it; then let them go."""
        notice, control = self._engines.end_notice, self._control
        saved = sum(each.kind == "checkpoint" for each in control.progress.happenings)
        folder, ending = control.spec.plan.checkpoint, notice.text
        if ending and ending != self._noticed:
            self._noticed, self._saved_before = ending, saved
            text = "the newest snapshot stays in this kernel; give a folder (--checkpoint DIR) to keep it"
            with contextlib.suppress(ClusterError):  # a prediction, or a run that has just ended
                if folder:
                    control.command("checkpoint", folder)
                    text = f"a checkpoint is saved in {folder}, from which --resume continues"
            control.progress.note(f"{ending}: {text}")
            self._record(Noted(rank=0, text=f"{ending}: {text}"))
        elif ending and (saved > self._saved_before or not folder):
            notice.let_go()

    def _is_hung(self) -> bool:
        """Whether the run hangs and has to end; where ranks can be replaced instead, this kills them."""
        hang = self._hangs.found(self._control.progress)
        if hang is None:
            return False
        self._control.progress.note(hang.text)
        self._record(Noted(rank=0, text=hang.text))
        if not hang.certain:
            return False
        if hang.culprits:
            self._loss_reason = hang.text
            self._engines.kill(hang.culprits)
        else:
            self._hang_error = EngineError(f"{hang.text}.")
        return self._hang_error is not None

    def _outcome(self, rank: int) -> Outcome:
        call = self._calls[rank]
        error = call.exception()  # raised, its traceback would hold this frame, and the run's memory
        if error is None:
            outcome: Outcome = call.result()
            if outcome.failure is not None and outcome.failure.kind == SegmentGoneError.__name__:
                # Its agent has been killed, which it will be in a moment too: until then it looks as if it could train.
                self._engines.kill([rank])
                return self._lost_outcome(rank)
            if outcome.failure is None or not outcome.failure.secondary:  # a secondary failure's output can come later
                settle(call)
        elif isinstance(error, EngineDied):
            outcome = self._lost_outcome(rank)
        elif isinstance(error, CallError):
            snapshot = dataclasses.replace(self._control.progress.ranks[rank], state="failed")
            failure = Failure.reported(rank, error.kind, error.message)
            outcome = Outcome(rank=rank, state="failed", snapshot=snapshot, failure=failure)
        else:
            raise error
        if rank in self._interrupted and outcome.failure is not None and outcome.failure.kind == "KeyboardInterrupt":
            return dataclasses.replace(outcome, failure=dataclasses.replace(outcome.failure, secondary=True))
        return outcome

    def _lost_outcome(self, rank: int) -> Outcome:
        snapshot = dataclasses.replace(self._control.progress.ranks[rank], state="lost")
        return Outcome(rank=rank, state="failed", snapshot=snapshot, failure=Failure.lost(rank))

    def _is_lost(self, outcomes: list[Outcome]) -> bool:
        """Whether lost processes are the only cause of the failures, so that the run can recover."""
        failures = [outcome.failure for outcome in outcomes if outcome.failure is not None]
        return (
            not (self._control.abandoned or self._hang_error or self._control.spec.on_failure == "stop")
            and any(failure.kind == LOST for failure in failures)
            and all(failure.secondary for failure in failures)
        )

    def _recover(self, outcomes: list[Outcome]) -> None:
        """Replace lost ranks, or change their number; then all resume from the newest snapshot.

        Raises:
            ClusterError: Ranks are lost repeatedly without progress, or cannot be replaced.
        """
        control, start_s, before = self._control, time.monotonic(), self._engines.size
        lost = [outcome.rank for outcome in outcomes if outcome.failure is not None and outcome.failure.kind == LOST]
        with control.changing:
            control.progress.recover()
            # A scale command given meanwhile counts instead of the one that ended the ranks.
            wanted = control.take_wanted(max(outcome.ranks for outcome in outcomes))
        store, states = control.snapshot_store, control.progress.ranks.values()
        if store is not None:
            store.refresh()  # as the ranks were placed until now
        # Of any rank: a lost one has not published its last steps, but the outcomes of the others have theirs.
        reached = max(state.step for state in states) if store is None else store.last_step
        if reached > self._last_step:  # progress: without snapshots, a restart has to come past this step again
            self._last_step, self._tries = reached, 0
        replaced = set(lost)
        if self._loss_reason == PROCESS_ENDED and (hosts := self._lost_hosts(lost)):
            self._loss_reason = f"{'hosts' if len(hosts) > 1 else 'host'} {', '.join(hosts)} lost"
        self._show(dict.fromkeys(replaced, "lost"))
        while True:
            self._tries += bool(lost)
            if self._tries >= _TRIES:
                step = max(self._last_step, 0) + 1
                raise EngineError(
                    f"{ranks_text(lost)}: the process ended {_TRIES} times at step {step} or before: "
                    f"{_PROBABLE_CAUSE if self._loss_reason == PROCESS_ENDED else self._loss_reason}.", rank=lost[0],
                )  # fmt: skip
            try:
                replaced.update(self._engines.lost)
                self._dispatch.prepare_ranks(wanted or self._size())
                self._show(dict.fromkeys(replaced, "recovering"))
                step = self._dispatch.resume_step()
                self._calls = self._dispatch.start(from_snapshot=True, restart=True)
                break
            except ClusterError as error:
                if self._engines.ended:
                    raise ClusterError("the engines were stopped during the run.") from error
                self._engines.check_alive()
                if not self._engines.hosts:
                    raise ClusterError(ALL_LOST) from error
                if not lost:  # scaling failed: continue with the engines that are left
                    lost, wanted = self._engines.lost or [0], 0
        self._report_recovery(replaced, before, step, time.monotonic() - start_s)

    def _lost_hosts(self, ranks: Iterable[int]) -> list[str]:
        """The names of the lost hosts on which ranks were."""
        placed = self._engines.placed()
        return sorted({host.name for rank in ranks if (host := placed[rank]) is not None and host.lost})

    def _size(self) -> int:
        """How many ranks to resume with: as many as before, or with on_failure="shrink" as many as are left."""
        control, engines = self._control, self._engines
        left = engines.size - len(engines.lost)
        if control.spec.on_failure != "shrink" or left in (0, engines.size):
            return engines.size
        for size in range(left, 0, -1):
            with contextlib.suppress(PlanError):  # the mesh does not fit on so many
                control.spec.plan_for(size)
                return size
        return engines.size

    def _report_recovery(self, replaced: set[int], before: int, step: int, seconds: float) -> None:
        """Note and record which ranks were replaced, and from which step all resume."""
        control, size = self._control, self._engines.size
        lost = f"{ranks_text(replaced)} lost ({self._loss_reason}), " if replaced else ""
        became = f"replaced in {seconds:.2f} s" if size == before else f"{size} instead of {before} engines"
        text = f"{lost}{became}; all continue from step {step}"
        self._loss_reason = PROCESS_ENDED
        control.progress.note(text, "recovered")
        recovered = [Recovered(rank=rank, step=step, seconds=seconds) for rank in sorted(replaced) if rank < size]
        self._record(*recovered, Noted(rank=0, text=text))

    def _record(self, *events: Event) -> None:
        """Write events into the cluster's record: lost ranks cannot write their own."""
        with contextlib.closing(JsonlSink(cluster_record_path(self._control.spec.run_id))) as record:
            for event in events:
                record.emit(event)

    def _show(self, states: dict[int, str]) -> None:
        """Draw the given states of ranks; the others count as running."""
        ranks = self._control.progress.ranks
        ranks.update({r: dataclasses.replace(ranks[r], state=states.get(r, "running")) for r in ranks})
        self._draw()

    def _merge(self, outcomes: dict[int, Outcome]) -> None:
        """Merge the newest state of each rank; the last one from its outcome, for published ones may be late."""
        with self._control.changing:
            states = [state for state in self._dispatch.poll_states() if state.rank not in outcomes]
            states += [outcome.snapshot for outcome in outcomes.values() if outcome.snapshot is not None]
            self._control.progress.merge(*states)

    def _draw(self) -> None:
        if not draw(self._watch, self._run):
            self._watch = None


def _taken(returned: queue.SimpleQueue[int], within_s: float) -> list[int]:
    """All that is in a queue, as soon as something is."""
    found: list[int] = []
    with contextlib.suppress(queue.Empty):
        found.append(returned.get(timeout=within_s))
        while True:
            found.append(returned.get_nowait())
    return found


def draw(watch: Watch | None, run: Run) -> bool:
    """Call `watch` with the run; returns whether it succeeded: a failed drawing must not end the run."""
    try:
        if watch is not None:
            watch(run)
    except Exception as error:
        warnings.warn(f"run {run.run_id} continues without its panel, which cannot be drawn: {error!r}", stacklevel=2)
        return False
    return True

"""The Run: the handle that a user holds on one training."""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from nbdist.cluster.runs.replan import Replan
from nbdist.errors import ClusterError, NbdistError, PlanError, interrupted
from nbdist.plan import Plan
from nbdist.telemetry import Report, RunState, Timeline

__all__ = ["ON_FAILURE", "Run", "RunHandoff", "asked_again", "attend"]

ON_FAILURE = ("replace", "shrink", "stop")
_POLL_S = 0.02
_ATTENDED_S = 0.1
_SAME_STEP_S = 2.0  # for the last rank to tell of a step after the first has


class Run(Report):
    """One training, from start to end.

    What is asked of it after its last step has one outcome, which stands in `progress.notes`: a pause, a resume, a
    checkpoint and a learning rate are not carried out; a stop finds nothing to stop, and with ``now=True`` breaks off
    what is left to do; as many engines as were asked for are there when it has ended, or its notes say why not.

    Args:
        run_id: Its name in the record.
        plan: What is run.
        progress: What is known of it; kept up to date by the monitor.
        command: Gives the ranks a command: its name, and its value.
        asked: What the user asked for, to ask for more of it.
        replan: Makes its plan for another number of engines.
        on_failure: What is done when engines are lost: "replace" them, "shrink" to those that are left, or "stop".

    Attributes:
        error: Why it failed, if it did.
        snapshot_store: Where the ranks keep their snapshots; None where no memory is shared with them.
        abandoned: Whether it is to stop at once.
        wanted: How many engines it is to go on with; 0 for as many as there are.
        changing: Held while something is asked of it, told of it, or while it ends: it comes before its end, or never.
    """

    def __init__(
        self, run_id: str, plan: Plan, progress: RunState, command: Callable[[Run, str, Any], None],
        asked: dict[str, Any] | None = None, replan: Replan | None = None,
        on_failure: str = "replace",
    ) -> None:  # fmt: skip
        self.run_id = run_id
        self._plan = plan
        self._progress = progress
        self.error: BaseException | None = None
        self.snapshot_store: Any = None
        self.asked = asked or {}
        self.replan = replan
        self.on_failure = on_failure
        self.wanted = 0
        self.abandoned = False
        self._give_command = command
        self._printed: Callable[[str], dict[int, str]] = lambda stream: {}
        self._ended = threading.Event()
        self.changing = threading.RLock()

    @property
    def plan(self) -> Plan:
        """What is run; `split_at` says where a pipeline was cut, once it is."""
        cut = tuple(stage["first"] for stage in self.progress.stages[1:])
        return replace(self._plan, split_at=cut) if cut else self._plan

    @property
    def progress(self) -> RunState:
        """What is known of it; kept up to date by the monitor."""
        return self._progress

    @property
    def state(self) -> str:
        """One of "queued", "running", "paused", "finished", "stopped", "failed"."""
        state = self.progress.state
        return state if state in ("queued", "paused") or not self.progress.running else "running"

    def printed(self, stream: str = "stdout") -> dict[int, str]:
        """What the user's code has printed so far to "stdout" or "stderr", by rank."""
        return self._printed(stream)

    def stop(self, *, now: bool = False) -> None:
        """Ask all ranks to stop after the same step; their weights come home. Returns at once; see `wait`.

        Args:
            now: Whether to interrupt what ranks are doing, and to replace those that do not react: the state after
                the last step that all have completed comes home.
        """
        with self.changing:
            if self.progress.running:
                self.abandoned |= now
                if self.progress.state != "stopping":
                    self._give_command(self, "stop", None)

    def pause(self) -> None:
        """Ask all ranks to rest after the step they are in, until `resume` or `stop`. Returns at once.

        Raises:
            ClusterError: The run does not go on.
        """
        self._ask("pause")

    def resume(self) -> None:
        """Let a paused run go on: with the same bits as if it had not rested. Returns at once.

        Raises:
            ClusterError: The run does not go on.
        """
        self._ask("resume")

    def checkpoint(self, folder: str | None = None) -> None:
        """Ask all ranks to write a checkpoint of the state after the step they are in. Returns at once.

        Args:
            folder: Where to; by default the run's own folder (``--checkpoint``), and without one
                "checkpoints/RUN_ID". What was asked for here stays, however many there are.

        Raises:
            ClusterError: The run does not go on.
        """
        own = self._plan.checkpoint
        if folder is None and own:
            self._ask("checkpoint", own)
        else:
            self._ask("checkpoint", os.path.abspath(os.path.expanduser(folder or f"checkpoints/{self.run_id}")))

    def set_lr(self, rate: float) -> None:
        """Change the learning rate, on all ranks after the same step. Returns at once.

        Args:
            rate: That of the optimizer's first parameter group; the others are scaled alike, and so is what a
                scheduler makes of them from then on.

        Raises:
            PlanError: It is not a positive number.
            ClusterError: The run does not go on.
        """
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise PlanError(f"a learning rate of {rate!r} is not possible: use a positive number.")
        self._ask("lr", float(rate))

    def scale(self, engines: int) -> None:
        """Let the run go on with so many engines after the step that it is in: `Cluster.scale` asks for it.

        Raises:
            PlanError: Its mesh or its batch cannot be laid on so many.
            ClusterError: The run does not go on.
        """
        if self.progress.running and self.replan is not None:
            self.replan(engines)
        self._ask("scale", engines)

    def _ask(self, kind: str, value: Any = None) -> None:
        with self.changing:
            if self.progress.state == "queued":
                raise ClusterError(f"run {self.run_id} has not begun: it can only be stopped.")
            if not self.progress.running:
                raise ClusterError(f"run {self.run_id} has {self.progress.state}: start another one.")
            self._give_command(self, kind, value)

    def wait(self, timeout_s: float | None = None) -> Run:
        """Wait until the run has ended and the weights are home.

        Args:
            timeout_s: How long to wait in seconds; for ever by default.

        Returns:
            The run itself, which may still be running if the time was over.

        Raises:
            EngineError: The run failed.
            KeyboardInterrupt: The waiting was interrupted; the run goes on.
        """
        try:
            ended = self._ended.wait(timeout_s)
        except KeyboardInterrupt:
            raise interrupted(f"run {self.run_id} goes on: run.stop() ends it, or %dist_run stop.") from None
        if ended and self.error is not None:
            raise self.error
        return self

    def timeline(self) -> Timeline:
        """What each rank of the pipeline did in the newest step that all have told of; one is told every few seconds.

        Raises:
            PlanError: The run has no pipeline.
            ClusterError: There is no such step yet, or a rank ended before it told.
        """
        if self.plan.mesh.pp == 1:
            raise PlanError(f"a run on {self.plan.mesh} has no pipeline to draw: train with --strategy pipeline.")
        deadline = time.monotonic() + _SAME_STEP_S
        while True:
            last = not self.progress.running or time.monotonic() > deadline
            told = {rank: state.work for rank, state in self.progress.ranks.items() if state.work is not None}
            steps = {work.step for work in told.values()}
            if len(told) == len(self.progress.ranks) and len(steps) == 1:
                return Timeline(steps.pop(), {rank: work.work for rank, work in told.items()})
            if last:
                raise ClusterError("the ranks have told of no step in common: ask again a few seconds into a run.")
            self._ended.wait(_POLL_S)

    @property
    def ended(self) -> bool:
        """Whether the run has ended and all about its end is done: weights home, panel drawn."""
        return self._ended.is_set()

    def stand_on(self, plan: Plan) -> None:
        """It goes on on other ranks. Called by the monitor."""
        self._plan, self.progress.plan = plan, plan.to_dict()
        self.progress.have_ranks(plan.mesh.size)

    def forget(self, but: Run) -> None:
        """Let go of what is needed to go on from here; the snapshots may be those of another run by now. Local."""
        if self.snapshot_store is not None and self.snapshot_store is not but.snapshot_store:
            self.snapshot_store.close()
        self.snapshot_store, self.asked = None, {}

    def _end(self, state: str, error: NbdistError | None = None) -> None:
        """Called by the monitor, once, after the weights are home."""
        with self.changing:
            self.error = error
            self.progress.end(state, "" if error is None else str(error).partition("\n")[0])

    def _release(self) -> None:
        """Called by the monitor when everything about the end is done and drawn."""
        self._ended.set()


@dataclass(frozen=True, kw_only=True)
class RunHandoff:
    """What another kernel has to know of a run.

    Args:
        run_id: Its name in the record.
        title: What is trained, for people.
        payload: Task and plan.
        names: What the user calls model and data.
        hangs: When it hangs, and what is done then.
        replan: See `Run`.
        on_failure: See `Run`.
        snapshot_store: Where the ranks keep their snapshots.
    """

    run_id: str
    title: str
    payload: Any
    names: tuple[str, str]
    hangs: tuple[float | None, str]
    replan: Replan | None
    on_failure: str
    snapshot_store: tuple[list[str], ...] = ()


def asked_again(last: Run | None, options: dict[str, Any]) -> dict[str, Any]:
    """What the last run of this notebook was asked for, to go on from there with other options.

    Raises:
        PlanError: There was none.
    """
    if last is None or "model" not in last.asked:  # or another kernel was asked
        raise PlanError("there is no run of this notebook to go on with: name a model, data and a folder.")
    asked = {**last.asked, **options}
    if "steps" in options:
        asked.pop("epochs", None)
    if "epochs" in options:
        asked.pop("steps", None)
    asked["resume"] = options.get("resume", True)
    return asked


def attend(run: Run, while_waiting: Callable[[], None] = lambda: None, interrupts: int = 0) -> Run:
    """Wait for a run in the foreground; the first interrupt stops it after its step, a second one at once.

    Args:
        run: Which.
        while_waiting: Called again and again meanwhile.
        interrupts: How many have come already.

    Raises:
        KeyboardInterrupt: It was interrupted, and has ended now.
        EngineError: The run failed.
    """
    if interrupts:
        run.stop(now=interrupts > 1)
    while not run.ended:
        try:
            with contextlib.suppress(NbdistError):  # raised below, once all is done
                run.wait(_ATTENDED_S)
            while_waiting()
        except KeyboardInterrupt:
            interrupts += 1
            run.stop(now=interrupts > 1)
    if interrupts and run.error is None:
        raise interrupted(f"run {run.run_id} {run.state} after step {run.progress.step}, its weights are home.")
    return run.wait()

"""The Run: a user's handle on one training run: wait, stop, pause, checkpoint, change the learning rate."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbdist.errors import ClusterError, NbdistError, PlanError, interrupted, suggest
from nbdist.plan import Plan
from nbdist.plan.predict_options import PREDICT_OPTIONS
from nbdist.telemetry import Report, RunState, Timeline
from nbdist.telemetry.command_table import COMMANDS

if TYPE_CHECKING:
    from nbdist.cluster.runs.run_control import RunControl

__all__ = ["Run", "attend", "resume_arguments"]

_POLL_S = 0.02
_ATTENDED_S = 0.1
_CALLED_S = 0.01  # ranks wait for the function that is called after each epoch
_SAME_STEP_S = 2.0  # wait for the last rank to report a step after the first has


class Run(Report):
    """One training run, from start to end.

    A command given after the last step has one outcome, noted in `progress.notes`: a pause, a resume, a checkpoint and
    a learning rate are not carried out; a stop has nothing to stop, and with ``now=True`` interrupts the remaining
    work; after a scale the requested engines are there when the run has ended, or its notes say why not.

    Args:
        control: The cluster's side of it.
    """

    def __init__(self, control: RunControl) -> None:
        self.control = control

    @property
    def run_id(self) -> str:
        """Its name in the record."""
        return self.control.spec.run_id

    @property
    def model(self) -> Any:
        """The trained model, if a callable has built it: its weights lie in a temporary file.

        Raises:
            ClusterError: The run has not ended, or trains the user's own model.
        """
        if self.control.model is None:
            task = self.control.spec.task
            why = (
                "has not ended" if task is not None and task.in_file else f"trains {self.control.spec.names[0]} itself"
            )
            raise ClusterError(f"run {self.run_id} {why}: run.model is the model that a callable has built.")
        return self.control.model

    @property
    def ema(self) -> Any:
        """The moving average of the weights, as a state_dict of the model; of several, a dict, list or tuple of them.

        Frozen parameters in it are the model's own.

        Raises:
            ClusterError: The run has not ended, or its option `ema` was not given.
        """
        if self.control.ema is None:
            why = "has not ended" if self.progress.running else "has no moving average of the weights"
            raise ClusterError(f"run {self.run_id} {why}: run.ema is there after a run with ema=0.999 (--ema 0.999).")
        return self.control.ema

    @property
    def error(self) -> NbdistError | None:
        """Why it failed, if it did."""
        return self.control.error

    @property
    def plan(self) -> Plan:
        """The plan; `split_at` is where a pipeline was cut, and `checked` what the check found, once that is known."""
        cut = tuple(stage["first"] for stage in self.progress.stages[1:])
        plan = self.control.spec.plan
        return replace(plan, split_at=cut or plan.split_at, checked=self.progress.checked or plan.checked)

    @property
    def progress(self) -> RunState:
        """Its state, updated several times a second."""
        return self.control.progress

    @property
    def state(self) -> str:
        """One of "queued", "running", "paused", "finished", "stopped", "failed"."""
        state = self.progress.state
        return state if state in ("queued", "paused") or not self.progress.running else "running"

    def printed(self, stream: str = "stdout") -> dict[int, str]:
        """What the user's code has printed so far to "stdout" or "stderr", by rank."""
        return self.control.printed(stream)

    def stop(self, *, now: bool = False) -> None:
        """Stop all ranks after the same step, and load their weights. Returns at once; see `wait`.

        Args:
            now: Whether to interrupt the ranks within a step, and to replace those that do not react: the state after
                the last step that all ranks completed is loaded.
        """
        self.control.stop(now=now)

    def give(self, command: str, value: Any = None) -> None:
        """Give a command by its name in `COMMANDS`, as ``%dist_run`` and the panel do. Returns at once.

        Raises:
            PlanError: There is no such command, or it needs a value, or takes none.
            ClusterError: The run is not running.
        """
        kind = COMMANDS.get(command)
        if kind is None:
            raise PlanError(f"unknown command {command!r}: use {', '.join(COMMANDS)}.{suggest(command, COMMANDS)}")
        if value is None and kind.value and not kind.optional:
            raise PlanError(f"the command {command} needs a value: {kind.value}.")
        if value is not None and not kind.value:
            raise PlanError(f"the command {command} takes no value, and {value!r} was given: leave it out.")
        getattr(self, kind.method)(*(() if value is None else (value,)))

    def pause(self) -> None:
        """Pause all ranks after the current step, until `resume` or `stop`. Returns at once.

        Raises:
            ClusterError: The run is not running.
        """
        self.control.command("pause")

    def resume(self) -> None:
        """Continue a paused run, bit for bit as without the pause. Returns at once.

        Raises:
            ClusterError: The run is not running.
        """
        self.control.command("resume")

    def checkpoint(self, folder: str | None = None) -> None:
        """Save a checkpoint of the state after the current step. Returns at once.

        Args:
            folder: Where to; by default the run's own folder (``--checkpoint``), and without one
                "checkpoints/RUN_ID". Checkpoints saved by this call are never deleted.

        Raises:
            ClusterError: The run is not running.
        """
        own = self.control.spec.plan.checkpoint
        if folder is None and own:
            self.control.command("checkpoint", own)
        else:
            self.control.command(
                "checkpoint", os.path.abspath(os.path.expanduser(folder or f"checkpoints/{self.run_id}"))
            )

    def set_lr(self, rate: float) -> None:
        """Change the learning rate, on all ranks after the same step. Returns at once.

        Args:
            rate: Of the optimizer's first parameter group; those of the other groups, and what a scheduler sets from
                then on, are scaled by the same factor.

        Raises:
            PlanError: It is not a positive number.
            ClusterError: The run is not running.
        """
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise PlanError(f"a learning rate of {rate!r} is not possible: use a positive number.")
        self.control.command("lr", float(rate))

    def scale(self, engines: int) -> None:
        """Continue with so many engines after the current step; called by `Cluster.scale`.

        Raises:
            PlanError: Its mesh or its batch cannot be partitioned over so many.
            ClusterError: The run is not running.
        """
        if self.progress.running:
            self.control.spec.plan_for(engines)
        self.control.command("scale", engines)

    def wait(self, timeout_s: float | None = None) -> Run:
        """Wait until the run has ended and its weights are loaded.

        Args:
            timeout_s: How long to wait in seconds; for ever by default.

        Returns:
            The run itself; still running if the timeout passed.

        Raises:
            EngineError: The run failed.
            KeyboardInterrupt: The wait was interrupted; the run continues.
        """
        try:
            ended = self.control.wait(timeout_s)
        except KeyboardInterrupt:
            raise interrupted(f"run {self.run_id} continues: run.stop() ends it, or %dist_run stop.") from None
        if ended and self.error is not None:
            raise self.error
        return self

    def predict(self, data: Any, **options: Any) -> Any:
        """The outputs of the trained model for a data set, in its order: `Cluster.predict`, with this run's options.

        Args:
            data: See `Cluster.predict`.
            **options: See `Cluster.predict`; by default strategy, batch size and precision are those of the training.

        Raises:
            ClusterError: It runs, or a later run has taken its place, or its cluster has ended.
        """
        control = self.control
        if self.progress.running:
            raise ClusterError(f"run {self.run_id} is running: wait for it (run.wait()), then predict.")
        if control.predict is None or "model" not in control.arguments:
            raise ClusterError(
                f"run {self.run_id} has been followed by another one, and no longer has its model: use "
                "cluster.predict(model, data)."
            )
        own = {name: control.spec.options.get(name) for name in PREDICT_OPTIONS}
        if getattr(data, "batch_size", None) is not None:  # a DataLoader's
            del own["batch_size"]
        if len(self.plan.split_at) == self.plan.stages - 1:
            own["split_at"] = self.plan.split_at or None
        if options.get("strategy") is not None:
            del own["split_at"], own["tensor_plan"]
        names = (control.spec.names[0], "data")
        model = control.arguments["model"] if control.model is None else control.model
        return control.predict(model, data, names, {**own, **options})

    def timeline(self) -> Timeline:
        """What each rank of the pipeline did in the newest step that all reported; they report one every few seconds.

        Raises:
            PlanError: The run has no pipeline.
            ClusterError: There is no such step yet, or a rank ended before its report.
        """
        if self.plan.mesh.pp == 1:
            raise PlanError(f"a run on {self.plan.mesh} has no pipeline to draw: train with --strategy pipeline.")
        deadline = time.monotonic() + _SAME_STEP_S
        while True:
            last = not self.progress.running or time.monotonic() > deadline
            reported = {rank: state.work for rank, state in self.progress.ranks.items() if state.work is not None}
            steps = {work.step for work in reported.values()}
            if len(reported) == len(self.progress.ranks) and len(steps) == 1:
                return Timeline(steps.pop(), {rank: work.work for rank, work in reported.items()})
            if last:
                raise ClusterError("the ranks have reported no step in common: try again a few seconds into a run.")
            self.control.wait(_POLL_S)

    @property
    def ended(self) -> bool:
        """Whether the run has ended completely: weights loaded, panel drawn."""
        return self.control.ended


def resume_arguments(last: Run | None, options: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Cluster.train` that resume the last run of this notebook, with some options changed.

    Raises:
        PlanError: There was none.
    """
    given = {} if last is None else last.control.arguments
    if not given:
        raise PlanError("there is no run of this notebook to resume: name a model, data and a folder.")
    arguments = {**given, **options}  # None leaves an option of the last run out
    if last is not None and last.control.model is not None:
        arguments |= {"model": last.control.model, "weights": None}
    for name, other in (("steps", "epochs"), ("epochs", "steps")):
        if options.get(name) is not None:
            arguments.pop(other, None)
    arguments["resume"] = options.get("resume", True)
    return arguments


def attend(run: Run, while_waiting: Callable[[], None] = lambda: None, interrupts: int = 0) -> Run:
    """Wait for a run in the foreground; the first interrupt stops it after its step, a second one at once.

    Args:
        run: The run.
        while_waiting: Called in a loop meanwhile.
        interrupts: How many interrupts have come already.

    Raises:
        KeyboardInterrupt: It was interrupted, and has ended now.
        EngineError: The run failed.
        Exception: What the function that is called after each epoch has raised; the run has ended then.
    """
    calls = run.control.epoch_calls
    if interrupts:
        run.stop(now=interrupts > 1)
    while not run.ended:
        try:
            with contextlib.suppress(NbdistError):  # raised below, once the run has ended completely
                run.wait(_ATTENDED_S if calls is None else _CALLED_S)
            if calls is not None:
                calls.poll()
            while_waiting()
        except KeyboardInterrupt:
            interrupts += 1
            run.stop(now=interrupts > 1)
    if calls is not None and calls.error is not None and run.error is None:
        raise calls.error
    if interrupts and run.error is None and not run.control.spec.trains:
        kind = run.control.spec.kind
        raise interrupted(f"the {kind} has been stopped, without {'outputs' if kind == 'prediction' else 'a result'}.")
    if interrupts and run.error is None:
        raise interrupted(f"run {run.run_id} {run.state} after step {run.progress.step}, its weights are loaded.")
    return run.wait()

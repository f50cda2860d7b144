"""The cluster's side of a run: its spec, state, commands and end. The user's side is the `Run`."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nbdist.errors import ClusterError, NbdistError
from nbdist.plan import Plan
from nbdist.telemetry import RunState

if TYPE_CHECKING:
    from nbdist.cluster.runs.epoch_calls import EpochCalls
    from nbdist.cluster.runs.run_spec import RunSpec
    from nbdist.core.state.snapshot import SnapshotStore

__all__ = ["RunControl"]

GiveCommand = Callable[["RunControl", str, Any], None]
"""Sends the ranks of a run a command: its kind and its value."""
Output = Callable[[str], dict[int, str]]
"""What ranks have printed so far to "stdout" or "stderr", by rank."""


class RunControl:
    """What queue, dispatch and monitor share about one run, from its queue to its end.

    Args:
        spec: What is run.
        progress: Its state.
        give_command: How commands reach the ranks.
        arguments: The user's arguments of `Cluster.train`, to resume with; {} for the run of another kernel.
        predict: Predicts with a model and data, under names, with options; returns the outputs.

    Attributes:
        spec: What is run, on the present number of ranks.
        progress: Its state; kept up to date by the monitor.
        error: Why it failed, if it did.
        snapshot_store: The ranks' snapshot buffers; None where no memory is shared with them.
        abandoned: Whether it is to stop at once, within a step.
        wanted: The number of engines to continue with; 0 for no change.
        outputs: Those of a prediction, once it has ended.
        epoch_calls: Of the function that the notebook calls after each epoch, if it has one.
        ema: The moving average of the weights, once it has ended, if its plan asks for it.
        model: The model, once it has ended, if a callable has built it.
        start: The weights that it began with, see `keep_start`; None if they are not kept.
        changing: A lock for commands, state updates and the end, so that a command comes before the end or is refused.
    """

    def __init__(
        self, spec: RunSpec, progress: RunState, give_command: GiveCommand, arguments: dict[str, Any] | None = None,
        predict: Callable[..., Any] | None = None,
    ) -> None:  # fmt: skip
        self.spec = spec
        self.progress = progress
        self.arguments = arguments or {}
        self.error: NbdistError | None = None
        self.snapshot_store: SnapshotStore | None = None
        self.abandoned = False
        self.wanted = 0
        self.outputs: Any = None
        self.epoch_calls: EpochCalls | None = None
        self.ema: Any = None
        self.model: Any = None
        self.start: Any = None
        self.predict = predict
        self.changing = threading.RLock()
        self._give_command = give_command
        self._outputs: list[Output] = []
        self._ended = threading.Event()

    # Its user.

    def command(self, kind: str, value: Any = None) -> None:
        """Give the ranks a command; `stop` has rules of its own.

        Raises:
            ClusterError: The run is not running.
        """
        with self.changing:
            if not self.spec.trains:
                raise ClusterError(
                    f"{self.spec.run_id} is a {self.spec.kind}, which can only be stopped: {kind} needs a training."
                )
            if self.progress.state == "queued":
                raise ClusterError(f"run {self.spec.run_id} has not started: it can only be stopped.")
            if not self.progress.running:
                raise ClusterError(f"run {self.spec.run_id} has {self.progress.state}: start another one.")
            self._give_command(self, kind, value)

    def stop(self, *, now: bool = False) -> None:
        """See `Run.stop`; once is enough, and after the end it has no effect."""
        with self.changing:
            if self.progress.running:
                self.abandoned |= now or not self.spec.trains  # half of the outputs are of no use
                if self.progress.state != "stopping":
                    self._give_command(self, "stop", None)

    def printed(self, stream: str) -> dict[int, str]:
        """What ranks have printed to "stdout" or "stderr", before and after restarts."""
        texts: dict[int, str] = {}
        for output in self._outputs:
            for rank, text in output(stream).items():
                texts[rank] = texts.get(rank, "") + text
        return texts

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the run has ended completely; returns whether it has."""
        return self._ended.wait(timeout_s)

    def forget(self, but: RunControl) -> None:
        """Free what a resume needs, except snapshots that run `but` has taken over. Local."""
        if self.snapshot_store is not None and self.snapshot_store is not but.snapshot_store:
            self.snapshot_store.close()
        self.snapshot_store, self.start, self.arguments = None, None, {}

    # Its start.

    def begin(self) -> None:
        """It leaves the queue."""
        with self.changing:
            self.progress.begin()

    def use_plan(self, plan: Plan) -> None:
        """Run this plan from now on."""
        self.spec, self.progress.plan = replace(self.spec, plan=plan), plan.to_dict()

    def resize(self, ranks: int) -> None:
        """Use the plan for another number of ranks.

        Raises:
            PlanError: There is none.
        """
        self.use_plan(self.spec.plan_for(ranks))
        self.progress.resize(ranks)

    def keep_snapshots(self, store: SnapshotStore | None) -> None:
        """The buffers that its ranks take snapshots in."""
        self.snapshot_store = store

    def add_output(self, output: Output) -> None:
        """Ranks were started, and print this from now on."""
        self._outputs.append(output)

    # Its number of engines.

    def want(self, engines: int) -> None:
        """Continue with so many engines; 0 for no change. The newest number counts."""
        self.wanted = engines

    def take_wanted(self, otherwise: int) -> int:
        """The number of engines to continue with, which no longer is pending; `otherwise` if none was given."""
        wanted, self.wanted = self.wanted or otherwise, 0
        return wanted

    # Its end.

    @property
    def ended(self) -> bool:
        """Whether it has ended completely: weights loaded, panel drawn."""
        return self._ended.is_set()

    def end(self, state: str, error: NbdistError | None = None) -> None:
        """It ends in this state: its weights are loaded. Once; then `release`."""
        with self.changing:
            self.error = error
            self.progress.end(state, "" if error is None else str(error).partition("\n")[0])

    def release(self) -> None:
        """Wake up `wait`: the end is complete and drawn. The task, with its data, is no longer needed."""
        if self.spec.task is not None and self.spec.task.in_file:
            self.model = self.spec.task.given
        self.spec = replace(self.spec, task=None)
        self._ended.set()

"""The Run: the handle that a person holds on one training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from nbdist.errors import ClusterError, NbdistError, PlanError
from nbdist.plan import Plan
from nbdist.telemetry import RunState, Timeline, run_html, run_text

__all__ = ["Run"]

_POLL_S = 0.02
_SAME_STEP_S = 2.0  # for the last rank to tell of a step after the first has


class Run:
    """One training, from start to end.

    Args:
        run_id: Its name in the record.
        plan: What is run.
        progress: What is known of it; kept up to date by the relay.
        request_stop: Asks the ranks to stop after the step they are in.
        vaults: Where the ranks keep their snapshots; None where no memory is shared with them.
        asked: What the person asked for, to ask for more of it.
    """

    def __init__(
        self, run_id: str, plan: Plan, progress: RunState, request_stop: Callable[[], None], vaults: Any = None,
        asked: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.run_id = run_id
        self._plan = plan
        self.progress = progress
        self.error: BaseException | None = None
        self.vaults = vaults
        self.asked = asked or {}
        self.abandoned = False
        self._request_stop = request_stop
        self._printed: Callable[[str], dict[int, str]] = lambda stream: {}
        self._ended = threading.Event()

    @property
    def plan(self) -> Plan:
        """What is run; `split_at` says where a pipeline was cut, once it is."""
        cut = tuple(stage["first"] for stage in self.progress.stages[1:])
        return replace(self._plan, split_at=cut) if cut else self._plan

    @property
    def stages(self) -> list[dict[str, Any]]:
        """What a pipeline was cut into: of each stage where it begins and ends, its seconds and its parameters."""
        return [dict(stage) for stage in self.progress.stages]

    @property
    def state(self) -> str:
        """One of "running", "finished", "stopped", "failed"."""
        return "running" if self.progress.running else self.progress.state

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict an epoch, or one for the whole run under `steps`: `epoch`, `steps`, `samples`, `loss`, `seconds`.

        All but `epoch` are counted over that epoch's training; `val_loss` and `val_<metric>` follow where asked.
        """
        return [dict(row) for row in self.progress.history]

    def printed(self, stream: str = "stdout") -> dict[int, str]:
        """What the user's code has printed so far to "stdout" or "stderr", by rank."""
        return self._printed(stream)

    def stop(self, *, now: bool = False) -> None:
        """Ask all ranks to stop after the same step; their weights come home. Returns at once; see `wait`.

        Args:
            now: Whether to interrupt what ranks are doing, and to replace those that do not react: the state after
                the last step that all have completed comes home.
        """
        if self.progress.running:
            self.progress.state = "stopping"
            self.abandoned |= now
            self._request_stop()

    def wait(self, timeout_s: float | None = None) -> Run:
        """Wait until the run has ended and the weights are home.

        Args:
            timeout_s: How long to wait in seconds; for ever by default.

        Returns:
            The run itself, which may still be running if the time was over.

        Raises:
            EngineError: The run failed.
        """
        if self._ended.wait(timeout_s) and self.error is not None:
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

    def forget(self, but: Run) -> None:
        """Let go of what is needed to go on from here; the snapshots may be those of another run by now. Local."""
        if self.vaults is not None and self.vaults is not but.vaults:
            self.vaults.close()
        self.vaults, self.asked = None, {}

    def _end(self, state: str, error: NbdistError | None = None) -> None:
        """Called by the relay, once, after the weights are home."""
        self.error = error
        self.progress.end(state, "" if error is None else str(error).partition("\n")[0])

    def _release(self) -> None:
        """Called by the relay when everything about the end is done and drawn."""
        self._ended.set()

    def __repr__(self) -> str:
        return run_text(self.progress)

    def _repr_html_(self) -> str:
        return run_html(self.progress)

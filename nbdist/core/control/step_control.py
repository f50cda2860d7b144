"""Steering: all ranks carry out what a user asks for, after the same step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdist.core.control.commands import Command, Commands
from nbdist.core.optim.lr_schedulers import Scheduler
from nbdist.core.sync.gradient_sync import ControlFlags
from nbdist.telemetry import CommandApplied, Event

if TYPE_CHECKING:
    from nbdist.core.state.progress import TrainProgress
    from nbdist.core.state.snapshotter import Snapshotter
    from nbdist.core.strategies.strategy import Strategy

__all__ = ["StepControl"]

_LISTEN_S = 0.1
_NAP_S = 0.01


class StepControl:
    """Rank 0 hears orders and says in a step's gradient sync that there are some; then it tells all of them.

    A snapshot holds how many orders to its run have been carried out. Those that came later are carried out again,
    after the same step as before; of numbers of ranks the last one, for the ranks are begun anew after each.

    Args:
        commands: To this run; the same on all ranks whether there are any at all. Rank 0's are read.
        run_id: Of which run.
        strategy: What is trained.
        scheduler: Of its learning rates.
        snapshotter: Writes checkpoints.
        tell: Called with what is carried out.

    Attributes:
        stopped: Whether the training is to end after the present step.
        scaling: On how many ranks it is to be begun again then; 0 where it is not.
    """

    def __init__(
        self, commands: Commands | None, run_id: str, strategy: Strategy, scheduler: Scheduler,
        snapshotter: Snapshotter, tell: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self._commands = commands
        self._run_id = run_id
        self._channel = strategy.axes.world
        self._first = self._channel.rank == 0
        self._optimizer = strategy.task.optimizer
        self._scheduler = scheduler
        self._snapshotter = snapshotter
        self._tell = tell
        self._lag = strategy.lag
        self._log: list[Command] = []
        self._checkpoints: list[str] = []
        self._paused = self.stopped = False
        self.scaling = 0

    def begin(self, at: TrainProgress) -> None:
        """Before the first step: be as all were at `at`, paused too. **Collective** over the world."""
        if at.commands[0] != self._run_id:
            at.commands = (self._run_id, 0)
        if self._commands is None:
            return
        done: list[str] = []
        if self._first:
            self._log += self._commands.new()
            done = [command.kind for command in self._log[: at.commands[1]]]
        done = json.loads(self._channel.broadcast_bytes(json.dumps(done).encode()))
        self.stopped = "stop" in done
        self._paused = [kind for kind in done if kind in ("pause", "resume")][-1:] == ["pause"]
        if self._paused:
            number = max(i for i, kind in enumerate(done) if kind == "pause")
            self._tell(
                CommandApplied(rank=self._channel.rank, command="pause", value=None, step=at.step, number=number)
            )
        self._receive(at, again=True)

    def pending(self, at: TrainProgress) -> bool:
        """Whether there is something to do at the end of the step that begins at `at`, or soon after. Local."""
        if self._commands is None or not self._first:
            return False
        self._log += self._commands.new()
        return bool(self._due(at, at.step + 1 + self._lag))

    def apply_agreed(self, at: TrainProgress, agreed: ControlFlags | None) -> None:
        """A step is complete; do what changes its state. **Collective** where ranks have `agreed` of orders."""
        if agreed is not None and agreed.commands:
            self._receive(at)

    def pause_point(self, at: TrainProgress) -> float:
        """Write the checkpoints that were asked for, and wait while paused. **Collective** over the world.

        Returns:
            For how many seconds the training has rested.
        """
        if not (self._checkpoints or self._paused):
            return 0.0
        began_s = time.perf_counter()
        self._write(at, self._paused)
        while self._paused and not self.stopped:
            deadline = time.monotonic() + _LISTEN_S
            while self._first and self._commands is not None and time.monotonic() < deadline:
                self._log += self._commands.new()
                if self._due(at, at.step):
                    break
                time.sleep(_NAP_S)
            self._receive(at)  # nothing, mostly; who waits for it sees whether rank 0 lives, and rank 0 whether all do
            self._write(at, True)
        return time.perf_counter() - began_s

    def _due(self, at: TrainProgress, step: int) -> list[Command]:
        due = []
        for command in self._log[at.commands[1] :]:
            if command.step is not None and command.step > step:
                break
            due.append(command)
        return due

    def _receive(self, at: TrainProgress, again: bool = False) -> None:
        commands: list[Any] = []
        if self._first and self._commands is not None:
            for number, command in enumerate(self._due(at, at.step), at.commands[1]):
                if command.step is None and again:
                    continue
                if command.step is None:
                    self._commands.stamp(number, at.step)
                commands.append([command.kind, command.value, self._is_past(number)])
        for kind, value, past in json.loads(self._channel.broadcast_bytes(json.dumps(commands).encode())):
            if not past:
                self._carry_out(kind, value)
            number = at.commands[1]
            at.commands = (self._run_id, number + 1)
            self._tell(CommandApplied(rank=self._channel.rank, command=kind, value=value, step=at.step, number=number))

    def _is_past(self, number: int) -> bool:
        """Whether another number of ranks was asked for after this one, and these ranks are what came of that."""
        command, later = self._log[number], self._log[number + 1 :]
        return command.kind == "scale" and any(other.kind == "scale" and other.step is not None for other in later)

    def _carry_out(self, kind: str, value: Any) -> None:
        match kind:
            case "stop":
                self.stopped, self.scaling = True, 0
            case "scale" if self.scaling or not self.stopped:  # the newest number counts, but a stop more than any
                self.scaling = 0 if value == self._channel.size else value
                self.stopped = self.scaling > 0
            case "pause" | "resume":
                self._paused = kind == "pause"
            case "lr":
                self._scheduler.set_rate(self._optimizer, value)
            case "checkpoint":
                self._checkpoints.append(value)

    def _write(self, at: TrainProgress, wait: bool) -> None:
        folders, self._checkpoints = self._checkpoints, []
        for folder in dict.fromkeys(folders):
            self._snapshotter.write_checkpoint(at, folder)
        if wait:
            self._snapshotter.settle()

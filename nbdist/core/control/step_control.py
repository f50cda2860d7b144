"""Step control: all ranks apply the user's commands after the same step."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nbdist.core.control.commands import Command, Commands
from nbdist.core.optim.lr_schedulers import Schedulers
from nbdist.core.sync.agreement import ControlFlags
from nbdist.telemetry import CommandApplied, Event

if TYPE_CHECKING:
    from nbdist.core.state.snapshotter import Snapshotter
    from nbdist.core.state.train_progress import TrainProgress
    from nbdist.core.strategies.strategy import Strategy

__all__ = ["StepControl"]

_RECEIVE_EVERY_S = 0.1
_POLL_S = 0.01


class StepControl:
    """Rank 0 reads commands, sets a flag in the step's gradient sync, and after that step broadcasts them.

    A snapshot holds how many commands have been applied to its run. A recovery applies later ones again, each after
    its stamped step; of several "scale" commands only the last, since the run restarts on new ranks after each.

    Args:
        commands: Commands to this run, or None, on all ranks alike. Rank 0's are read.
        run_id: The run's id.
        strategy: What is trained.
        schedulers: Of its learning rates.
        snapshotter: Writes checkpoints.
        emit: Called with an event for each applied command.

    Attributes:
        stopped: Whether the training ends after this step.
        scaling: The number of ranks on which it then resumes; 0 if it does not.
    """

    def __init__(
        self, commands: Commands | None, run_id: str, strategy: Strategy, schedulers: Schedulers,
        snapshotter: Snapshotter, emit: Callable[[Event], None],
    ) -> None:  # fmt: skip
        self._commands = commands
        self._run_id = run_id
        self._channel = strategy.axes.world
        self._is_rank_0 = self._channel.rank == 0
        self._schedulers = schedulers
        self._snapshotter = snapshotter
        self._emit = emit
        self._lag = strategy.lag
        self._log: list[Command] = []
        self._checkpoints: list[str] = []
        self._paused = self.stopped = False
        self.scaling = 0

    def begin(self, progress: TrainProgress) -> None:
        """Before the first step: restore what commands had done at `progress`, a pause too. **Collective** (world)."""
        if progress.commands[0] != self._run_id:
            progress.commands = (self._run_id, 0)
        if self._commands is None:
            return
        applied: list[str] = []
        if self._is_rank_0:
            self._log += self._commands.new()
            applied = [command.kind for command in self._log[: progress.commands[1]]]
        applied = json.loads(self._channel.broadcast_bytes(json.dumps(applied).encode()))
        self.stopped = "stop" in applied
        self._paused = [kind for kind in applied if kind in ("pause", "resume")][-1:] == ["pause"]
        if self._paused:
            number = max(i for i, kind in enumerate(applied) if kind == "pause")
            self._emit(
                CommandApplied(rank=self._channel.rank, command="pause", value=None, step=progress.step, number=number)
            )
        self._receive(progress, replay=True)

    def pending(self, progress: TrainProgress) -> bool:
        """Whether commands are due after the step that begins at `progress`, or the step after the lag. Local."""
        if self._commands is None or not self._is_rank_0:
            return False
        self._log += self._commands.new()
        return bool(self._due(progress, progress.step + 1 + self._lag))

    def apply_agreed(self, progress: TrainProgress, agreed: ControlFlags | None) -> None:
        """After a step: apply new commands. **Collective** if the `agreed` flags report commands."""
        if agreed is not None and agreed.commands:
            self._receive(progress)

    def pause_point(self, progress: TrainProgress) -> float:
        """Write the requested checkpoints, and wait while paused. **Collective** over the world.

        Returns:
            Seconds spent here.
        """
        if not (self._checkpoints or self._paused):
            return 0.0
        began_s = time.perf_counter()
        self._write_checkpoints(progress, self._paused)
        while self._paused and not self.stopped:
            deadline = time.monotonic() + _RECEIVE_EVERY_S
            while self._is_rank_0 and self._commands is not None and time.monotonic() < deadline:
                self._log += self._commands.new()
                if self._due(progress, progress.step):
                    break
                time.sleep(_POLL_S)
            self._receive(progress)  # mostly empty: a collective, so that every rank notices if another one dies
            self._write_checkpoints(progress, True)
        return time.perf_counter() - began_s

    def _due(self, progress: TrainProgress, step: int) -> list[Command]:
        """Commands to apply after `step` at the latest: in the log's order, up to the first one stamped later."""
        due = []
        for command in self._log[progress.commands[1] :]:
            if command.step is not None and command.step > step:
                break
            due.append(command)
        return due

    def _receive(self, progress: TrainProgress, replay: bool = False) -> None:
        """Broadcast rank 0's due commands and apply them; on `replay` only stamped ones. **Collective**."""
        commands: list[Any] = []
        if self._is_rank_0 and self._commands is not None:
            for number, command in enumerate(self._due(progress, progress.step), progress.commands[1]):
                if command.step is None and replay:
                    continue
                if command.step is None:  # stamped before it is applied: a recovery then applies it after this step too
                    self._commands.stamp(number, progress.step)
                commands.append([command.kind, command.value, self._is_superseded(number)])
        for kind, value, superseded in json.loads(self._channel.broadcast_bytes(json.dumps(commands).encode())):
            if not superseded:
                self._apply(kind, value)
            number = progress.commands[1]
            progress.commands = (self._run_id, number + 1)
            self._emit(
                CommandApplied(rank=self._channel.rank, command=kind, value=value, step=progress.step, number=number)
            )

    def _is_superseded(self, number: int) -> bool:
        """Whether a "scale" command was followed by another one that is stamped: the present ranks are its result."""
        command, later = self._log[number], self._log[number + 1 :]
        return command.kind == "scale" and any(other.kind == "scale" and other.step is not None for other in later)

    def _apply(self, kind: str, value: Any) -> None:
        match kind:
            case "stop":
                self.stopped, self.scaling = True, 0
            case "scale" if self.scaling or not self.stopped:  # the newest number counts, but a stop overrides any
                self.scaling = 0 if value == self._channel.size else value
                self.stopped = self.scaling > 0
            case "pause" | "resume":
                self._paused = kind == "pause"
            case "lr":
                self._schedulers.set_rate(value)
            case "checkpoint":
                self._checkpoints.append(value)

    def _write_checkpoints(self, progress: TrainProgress, wait: bool) -> None:
        folders, self._checkpoints = self._checkpoints, []
        for folder in dict.fromkeys(folders):
            self._snapshotter.write_checkpoint(progress, folder)
        if wait:
            self._snapshotter.wait_for_checkpoint()

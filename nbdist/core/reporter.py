"""The reporter: how far a rank has got, told several times a second."""

from __future__ import annotations

import time
from collections.abc import Callable

import psutil
import torch

from nbdist.core.comm import comm_timer
from nbdist.core.comm.world import World
from nbdist.core.state.progress import TrainProgress
from nbdist.core.sync.gradient_sync import Totals
from nbdist.core.sync.running_mean import RunningMean
from nbdist.telemetry import Event, Losses, Meter, Progress, Shares

__all__ = ["Reporter", "rate_of"]

_MEMORY_EVERY_S = 1.0


def rate_of(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the first group. Waits for the device where it lies there."""
    return float(optimizer.param_groups[0]["lr"])


class Reporter:
    """Tells of one rank's progress. Local.

    Args:
        world: Where the rank is.
        at: Where the training begins.
        optimizer: Whose learning rate is told.
        tell: Called with the events.
    """

    def __init__(
        self, world: World, at: TrainProgress, optimizer: torch.optim.Optimizer, tell: Callable[[Event], None]
    ) -> None:
        self._rank, self._device = world.rank, world.device
        self._optimizer = optimizer
        self._tell = tell
        self._meter = Meter(at.samples, at.step)
        self._losses = Losses()
        self._process = psutil.Process()
        self._memory, self._memory_due_s = 0, 0.0
        self._spent = comm_timer.idle, comm_timer.communication, comm_timer.data

    def report(self, totals: Totals, step: int) -> None:
        """All ranks have added up what they lost in `step`."""
        loss = totals.loss if self._rank == 0 else None
        if loss is not None:
            self._losses.add(step, loss)

    def leave_out(self, seconds: float) -> None:
        """The training has rested for so long."""
        self._meter.leave_out(seconds)

    def resume(self, at: TrainProgress) -> None:
        """Training goes on: what was spent since the last event is none."""
        self._meter.read(at.samples, at.step)
        self._spent = comm_timer.idle, comm_timer.communication, comm_timer.data

    def tell_if_due(self, at: TrainProgress, loss: RunningMean) -> None:
        """Tell where the rank stands, if it has not lately."""
        if self._meter.due():
            self.tell(at, loss.value)

    def tell(self, at: TrainProgress, loss: float | None, samples_per_s: float | None = None) -> None:
        """Tell where the rank stands.

        Args:
            at: Where.
            loss: Of this rank's part of the latest step, or of the row.
            samples_per_s: Its speed; by default that since the last event.
        """
        speed, step_s, seconds = self._meter.read(at.samples, at.step)
        now = comm_timer.idle, comm_timer.communication, comm_timer.data
        idle, communication, data = ((n - b) / seconds for n, b in zip(now, self._spent, strict=True))
        self._spent = now
        shares = Shares(max(0.0, 1.0 - idle - communication - data), communication, data, idle)
        self._tell(Progress(
            rank=self._rank, step=at.step, epoch=at.epoch, samples=at.samples, loss=loss,
            samples_per_s=speed if samples_per_s is None else samples_per_s, memory_mib=self._memory_in_use() / 2**20,
            lr=rate_of(self._optimizer), step_s=step_s, shares=shares, losses=self._losses.take(),
        ))  # fmt: skip

    def _memory_in_use(self) -> int:
        """Bytes; on a CPU, where the system has to be asked, as of the last second."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        if (now_s := time.monotonic()) >= self._memory_due_s:
            self._memory, self._memory_due_s = self._process.memory_info().rss, now_s + _MEMORY_EVERY_S
        return self._memory

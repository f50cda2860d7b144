"""The reporter: emits one rank's Progress events: step, loss, speed, memory, share of time spent waiting."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch

from nbdist.core.comm import comm_timer
from nbdist.core.comm.world import World
from nbdist.core.optim.lr_schedulers import Schedulers
from nbdist.core.state.train_progress import TrainProgress
from nbdist.core.sync.running_mean import RunningMean
from nbdist.core.sync.step_tail import Totals
from nbdist.core.task.own_loop import explained_step
from nbdist.core.task.steps import Step
from nbdist.telemetry import Curves, Event, Meter, Progress, RunFailed, Shares

__all__ = ["Reporter", "reporting_failure"]

_MEMORY_EVERY_S = 1.0


class Reporter:
    """Emits one rank's progress. Local.

    Args:
        world: The rank's world.
        progress: Where the training starts.
        schedulers: Their learning rate is reported.
        emit: Called with the events.
    """

    def __init__(
        self, world: World, progress: TrainProgress, schedulers: Schedulers, emit: Callable[[Event], None]
    ) -> None:
        self._rank, self._device = world.rank, world.device
        self._schedulers = schedulers
        self._emit = emit
        self._meter = Meter(progress.samples, progress.step)
        self._second = progress.step + 2
        self._curves = Curves()
        self._process = psutil.Process()
        self._memory, self._memory_due_s = 0, 0.0
        self._comm_times = comm_timer.waiting, comm_timer.communication, comm_timer.data

    def add_totals(self, totals: Totals, step: int) -> None:
        """Add the mean loss of `step` over all ranks, and what it logs, to the curves, on rank 0."""
        if self._rank:
            return
        if (loss := totals.loss) is not None:
            self._curves.add("loss", step, loss)
        for name, mean in totals.log.means.items() if totals.log is not None else ():
            self._curves.add(name, step, mean)

    def exclude(self, seconds: float) -> None:
        """Leave a pause out of the speed."""
        self._meter.exclude(seconds)

    def resume(self, progress: TrainProgress) -> None:
        """Training continues after an evaluation: leave out the time since the last event."""
        self._meter.read(progress.samples, progress.step)
        self._comm_times = comm_timer.waiting, comm_timer.communication, comm_timer.data

    def report_if_due(self, progress: TrainProgress, loss: RunningMean) -> None:
        """Emit progress, unless an event was emitted a moment ago; the second step always: hangs count from it."""
        if self._meter.due() or progress.step == self._second:
            self.report(progress, loss.value)

    def report(self, progress: TrainProgress, loss: float | None, samples_per_s: float | None = None) -> None:
        """Emit progress.

        Args:
            progress: How far the rank is.
            loss: Of this rank's part of the latest step, or of the row.
            samples_per_s: Its speed; by default since the last event.
        """
        speed, step_s, seconds = self._meter.read(progress.samples, progress.step)
        now = comm_timer.waiting, comm_timer.communication, comm_timer.data
        idle, communication, data = ((n - b) / seconds for n, b in zip(now, self._comm_times, strict=True))
        self._comm_times = now
        shares = Shares(max(0.0, 1.0 - idle - communication - data), communication, data, idle)
        self._emit(Progress(
            rank=self._rank, step=progress.step, epoch=progress.epoch, samples=progress.samples, loss=loss,
            samples_per_s=speed if samples_per_s is None else samples_per_s, memory_mib=self._memory_in_use() / 2**20,
            lr=self._schedulers.rate, step_s=step_s, shares=shares, curves=self._curves.take(),
        ))  # fmt: skip

    def _memory_in_use(self) -> int:
        """Bytes in use; on a CPU, where reading them is a system call, cached for a second."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        if (now_s := time.monotonic()) >= self._memory_due_s:
            self._memory, self._memory_due_s = self._process.memory_info().rss, now_s + _MEMORY_EVERY_S
        return self._memory


@contextlib.contextmanager
def reporting_failure(
    emit: Callable[[Event], None], rank: int, beginning: Sequence[Event] = (), step: Step | None = None
) -> Iterator[None]:
    """Context that emits the failure of a run, as the user is told of it. Local.

    Args:
        emit: Called with the events.
        rank: This rank.
        beginning: Events that are emitted before, as long as they are in it.
        step: The training step, in which some errors have a sentence of their own.
    """
    try:
        yield
    except BaseException as failure:
        known = None if step is None else explained_step(failure, step)
        error = failure if known is None else known.with_traceback(failure.__traceback__)
        for event in beginning:  # of a run that fails before its first step
            emit(event)
        emit(RunFailed(rank=rank, error=f"{type(error).__name__}: {error}"))
        if known is not None:
            raise error from None
        raise

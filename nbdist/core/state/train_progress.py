"""Train progress: epoch, batch, step and counts, which a rank needs beside weights and state to resume exactly."""

from __future__ import annotations

import time
from typing import Any

import torch

from nbdist.core.comm import Channel
from nbdist.core.sync.running_mean import RunningMean
from nbdist.core.sync.step_tail import LogTotals
from nbdist.plan import Plan

__all__ = ["Row", "TrainProgress"]


class Row:
    """Counts of one history row on this rank.

    Args:
        device: Of the losses.
        state_dict: Counts to continue from, see `state_dict`.

    Attributes:
        steps: In the row.
        samples: That this rank has read.
        loss: Of those samples.
        all_samples: That all ranks have read; None if this rank does not know it.
        all_losses: Of all ranks, as each step sums them beside the gradients, and in the precision of these.
    """

    def __init__(self, device: torch.device, state_dict: dict[str, Any] | None = None) -> None:
        state_dict = state_dict or {"steps": 0, "samples": 0, "loss": (0.0, 0.0), "seconds": 0.0, "log": {}}
        self.steps: int = state_dict["steps"]
        self.samples: int = state_dict["samples"]
        self.loss = RunningMean(device, tuple(state_dict["loss"]))
        logged = state_dict.get("log", {})  # not in checkpoints of 0.1
        self._log = {name: RunningMean(device, tuple(sums)) for name, sums in logged.items()}
        self.all_samples: int | None = state_dict.get("all_samples", None if self.steps else 0)
        self.all_losses = RunningMean(device, tuple(state_dict.get("all_losses", (0.0, 0.0))))
        self._device = device
        self._started_s: float = time.perf_counter() - state_dict["seconds"]

    @property
    def seconds(self) -> float:
        """Seconds of training since the row began."""
        return time.perf_counter() - self._started_s

    def exclude(self, seconds: float) -> None:
        """Leave a pause out of `seconds`."""
        self._started_s += seconds

    def add_log(self, log: LogTotals) -> None:
        """Add a step's log, which all ranks have alike."""
        for name, parts in log.parts.items():
            self._log.setdefault(name, RunningMean(self._device)).add_sums(*parts)

    def add_batch(self, samples: int | None, losses: tuple[Any, Any] | None) -> None:
        """Add a step's samples on all ranks, and its `Totals.parts`; None if this rank does not know them."""
        if samples is None or losses is None or self.all_samples is None:
            self.all_samples = None
        else:
            self.all_samples += samples
            self.all_losses.add_sums(*losses)

    def state_dict(self) -> dict[str, Any]:
        """The counts as JSON-able data. Waits for the device."""
        counts = {
            "steps": self.steps, "samples": self.samples, "loss": self.loss.sums.tolist(), "seconds": self.seconds,
            "log": {name: mean.sums.tolist() for name, mean in self._log.items()},
        }  # fmt: skip
        if self.all_samples is not None:
            counts |= {"all_samples": self.all_samples, "all_losses": self.all_losses.sums.tolist()}
        return counts

    def close(self, channel: Channel, reports_loss: bool, epoch: int, seconds: float) -> dict[str, Any]:
        """The row summed over all ranks, the same on each. **Collective** over all of them.

        Args:
            channel: Over all ranks.
            reports_loss: Whether this rank's samples and losses count: of those that read the same samples, one does.
                Others may have the same losses, but not of the same steps, after a resume from another mesh.
            epoch: The row's number.
            seconds: How long it took; rank 0's value is used.
        """
        counted = [self.samples if reports_loss else 0, seconds if channel.rank == 0 else 0.0]
        losses = self.loss.sums if reports_loss else torch.zeros(2, dtype=torch.float64, device=channel.device)
        sums = torch.cat([losses, torch.tensor(counted, dtype=torch.float64, device=channel.device)])
        channel.all_reduce_(sums)
        loss_sum, weight, samples, seconds = sums.tolist()
        return {
            "epoch": epoch,
            "steps": self.steps,
            "samples": round(samples),
            "loss": loss_sum / weight if weight else float("nan"),
            "seconds": seconds,
        } | {name: mean for name, one in self._log.items() if (mean := one.value) is not None}


class TrainProgress:
    """How far one rank is in a training; it changes only when a step is complete.

    Args:
        device: Of the losses.

    Attributes:
        epoch: The pass over the data, counted from 1.
        batch: Completed batches of it.
        step: Completed optimizer steps.
        samples: Samples this rank has read.
        history: The completed rows.
        row: The current one.
        commands: A run's id, and how many of its commands have been applied; see `StepControl`.
    """

    def __init__(self, device: torch.device) -> None:
        self.epoch, self.batch, self.step, self.samples = 1, 0, 0, 0
        self.history: list[dict[str, Any]] = []
        self.row = Row(device)
        self.commands: tuple[str, int] = ("", 0)
        self._device = device

    @property
    def moment(self) -> tuple[int, int]:
        """Completed steps, and completed epochs plus rows: greater after each change, the same on all ranks."""
        return self.step, self.epoch + len(self.history)

    def state_dict(self) -> dict[str, Any]:
        """The progress as JSON-able data. Local; waits for the device."""
        return {
            "epoch": self.epoch, "batch": self.batch, "step": self.step, "samples": self.samples,
            "history": self.history, "row": self.row.state_dict(), "commands": self.commands,
        }  # fmt: skip

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any], device: torch.device) -> TrainProgress:
        """The progress that `state_dict` describes."""
        progress = cls(device)
        progress.epoch, progress.batch, progress.step = state_dict["epoch"], state_dict["batch"], state_dict["step"]
        progress.samples, progress.history = state_dict["samples"], list(state_dict["history"])
        progress.row = Row(device, state_dict["row"])
        progress.commands = tuple(state_dict.get("commands", progress.commands))  # not in checkpoints of 0.1
        return progress

    def advance(
        self, samples: int, losses: list[tuple[Any, Any]], log: LogTotals | None = None, *,
        all_samples: int | None = None, all_losses: tuple[Any, Any] | None = None,
    ) -> None:  # fmt: skip
        """A step is complete.

        Args:
            samples: How many this rank has read.
            losses: Those that it computed, with their weights.
            log: The step's log over all ranks.
            all_samples: See `Row.add_batch`.
            all_losses: The same.
        """
        self.batch += 1
        self.step += 1
        self.samples += samples
        self.row.steps += 1
        self.row.samples += samples
        self.row.add_batch(all_samples, all_losses)
        for loss, weight in losses:
            self.row.loss.add(loss, weight)
        if log is not None:
            self.row.add_log(log)

    def next_epoch(self, row: dict[str, Any] | None) -> None:
        """A pass over the data is complete; its row too, unless the whole run is one."""
        self.epoch, self.batch = self.epoch + 1, 0
        if row is not None:
            self.close(row)

    def close(self, row: dict[str, Any]) -> None:
        """Append a complete row to the history and start another."""
        self.history = [*self.history, row]
        self.row = Row(self._device)

    def complete(self, plan: Plan) -> bool:
        """Whether all epochs or steps of `plan` are complete, the last row included."""
        passed = self.step >= plan.steps if plan.steps is not None else self.epoch > (plan.epochs or 0)
        return passed and self.row.steps == 0

    def beyond(self, plan: Plan) -> bool:
        """Whether it has passed the epochs or steps of `plan`: those of another plan, with a larger total."""
        if plan.steps is not None:
            return self.step > plan.steps
        return (self.epoch, self.batch) > ((plan.epochs or 0) + 1, 0)

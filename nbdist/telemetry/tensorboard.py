"""A TensorBoard sink: writes events as scalars."""

from __future__ import annotations

import json
import os
from typing import Any

from nbdist.errors import TaskError
from nbdist.telemetry.events import EpochFinished, Event, Progress, RunStarted
from nbdist.telemetry.sinks import Sink

__all__ = ["TensorBoardSink"]


class TensorBoardSink(Sink):
    """Writes the loss, what the step logs, learning rate and speed by step, and validation values after each epoch.

    Args:
        folder: TensorBoard's log folder; the run gets a subfolder.
        run_id: The subfolder's name.

    Raises:
        TaskError: The folder cannot be written.
    """

    def __init__(self, folder: str, run_id: str) -> None:
        self._folder = os.path.join(folder, run_id)
        self._writer: Any = None
        self._steps = 0
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as error:
            raise TaskError(f"tensorboard folder {folder} cannot be written: {error.strerror}.") from None

    def emit(self, event: Event) -> None:
        """Write the event; a recovered run's repeated steps replace the earlier ones."""
        match event:
            case RunStarted():
                from torch.utils.tensorboard import SummaryWriter

                self.close()
                self._writer = SummaryWriter(self._folder, purge_step=event.step + 1)
                self._writer.add_text("plan", f"    {json.dumps(event.plan, indent=1)}".replace("\n", "\n    "))
                self._steps = sum(row["steps"] for row in event.history)
            case Progress() if self._writer is not None:
                for name, points in event.curves.items():
                    for point in points:
                        self._add(f"{name}/train", point.mean, point.step, event)
                if event.lr is not None:
                    self._add("learning rate", event.lr, event.step, event)
            case EpochFinished() if self._writer is not None:
                row = event.row
                self._steps += row["steps"]
                self._add("samples per second", row["samples"] / max(row["seconds"], 1e-9), self._steps, event)
                for name, value in row.items():
                    if name.startswith("val_") and not isinstance(value, list):
                        self._add(f"{name.removeprefix('val_')}/validation", value, self._steps, event)

    def close(self) -> None:
        """Flush and close the writer."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _add(self, tag: str, value: float, step: int, event: Event) -> None:
        self._writer.add_scalar(tag, value, step, walltime=event.time_s)

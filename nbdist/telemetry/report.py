"""The report: history, DataFrame, plot and HTML of a run, running or past."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from nbdist.errors import PlanError
from nbdist.telemetry.run_state import RunState
from nbdist.telemetry.run_view import run_html, run_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

__all__ = ["Report"]


class Report(ABC):
    """The base class of `Run` and `PastRun`: views of a `RunState`. Local."""

    @property
    @abstractmethod
    def progress(self) -> RunState:
        """The state of the run."""

    @property
    def history(self) -> list[dict[str, Any]]:
        """One dict an epoch, or one for the whole run under `steps`: `epoch`, `steps`, `samples`, `loss`, `seconds`.

        All but `epoch` are counted over that epoch's training; what steps log follows, and `val_<name>` of the loss,
        the metric and what steps log, if there is validation data.
        """
        return [dict(row) for row in self.progress.history]

    @property
    def stages(self) -> list[dict[str, Any]]:
        """The stages of a pipeline: each one's first and last module, seconds and parameters."""
        return [dict(stage) for stage in self.progress.stages]

    def to_frame(self, *, steps: bool = False) -> DataFrame:
        """The history as a pandas DataFrame, one row an epoch, with the epoch as its index.

        Args:
            steps: Whether to return the loss curve instead: `loss`, `low` and `high` of the `steps` steps of a row,
                with the last of them as its index; fewer than 256 rows.

        Raises:
            PlanError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise PlanError("to_frame() needs pandas: pip install pandas; run.history is a list of dicts.") from None
        if not steps:
            columns = list(dict.fromkeys(["epoch", *(name for row in self.history for name in row)]))
            return pd.DataFrame(self.history, columns=columns).set_index("epoch")
        points = [point._asdict() for point in self.progress.curve]
        frame = pd.DataFrame(points, columns=["step", "steps", "mean", "low", "high"])
        return frame.rename(columns={"mean": "loss"}).set_index("step")

    def plot(self, ax: Axes | None = None) -> Axes:
        """Plot the training and validation loss over the steps with matplotlib; returns the axes.

        Args:
            ax: The axes to draw on; by default a new figure.

        Raises:
            PlanError: matplotlib is not installed.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError:
            raise PlanError("plot() needs matplotlib: pip install matplotlib.") from None
        if ax is None:
            _, ax = plt.subplots()
        curve = self.progress.curve
        ends, end = [], 0
        for row in self.history:
            end += row["steps"]
            ends.append(end)
        if curve:
            steps = [point.step for point in curve]
            ax.plot(steps, [point.mean for point in curve], label="train")
            ax.fill_between(steps, [point.low for point in curve], [point.high for point in curve], alpha=0.2)
        else:
            ax.plot(ends, [row["loss"] for row in self.history], marker="o", label="train")
        val = [(step, row["val_loss"]) for step, row in zip(ends, self.history, strict=True) if "val_loss" in row]
        if val:
            ax.plot(*zip(*val, strict=True), marker="o", label="validation")
        ax.set(xlabel="step", ylabel="loss", title=self.progress.title)
        ax.legend()
        return ax

    def __repr__(self) -> str:
        return run_text(self.progress)

    def _repr_html_(self) -> str:
        return run_html(self.progress)

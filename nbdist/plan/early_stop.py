"""Early stopping: whether the last epochs have not improved on the best one, by the history alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nbdist.errors import PlanError
from nbdist.plan.monitor import Monitor

__all__ = ["EarlyStop"]

_HOW = "write NAME:EPOCHS, as in val_loss:3, or NAME:EPOCHS:max where more is better"


@dataclass(frozen=True, kw_only=True)
class EarlyStop:
    """When a run ends before its last epoch.

    Args:
        monitor: The number that is to improve.
        patience: After how many epochs without improvement.
    """

    monitor: Monitor
    patience: int

    @classmethod
    def parse(cls, text: str) -> EarlyStop:
        """Read ``NAME:EPOCHS`` or ``NAME:EPOCHS:min|max``; most names say themselves what is better.

        Raises:
            PlanError: It is something else, or must say what is better.
        """
        found = re.fullmatch(r"([^:]+):([0-9]{1,9})(?::(min|max))?", str(text).replace(" ", ""))
        if found is None or not int(found[2]):
            raise PlanError(f"early_stop {text!r} says not when: {_HOW}.")
        return cls(monitor=Monitor.of("early_stop", text, found[1], found[3]), patience=int(found[2]))

    def reason(self, history: Sequence[Mapping[str, Any]]) -> str:
        """Why a run with this history ends now, in a clause; empty if it goes on.

        Raises:
            TaskError: The newest row has no such number.
        """
        if not history:
            return ""
        self.monitor.value(history[-1])
        name, best, at = self.monitor.name, math.nan, 0
        for number, row in enumerate(history):
            value = float(row.get(name, math.nan))
            if self.monitor.improves(value, best):
                best, at = value, number
        if len(history) - 1 - at < self.patience:
            return ""
        epochs = f"{self.patience} epoch{'s' if self.patience > 1 else ''}"
        best_epoch = history[at].get("epoch", at + 1)
        return f"{name} has not improved for {epochs} on {best:.6g} of epoch {best_epoch}"

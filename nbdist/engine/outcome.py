"""The outcome of a training on one rank, as its engine sends it to the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbdist.engine.failure import Failure
from nbdist.telemetry import RankState

__all__ = ["Outcome"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one rank of a training brings home.

    Args:
        rank: Which.
        state: "finished", "stopped", "scaled" or "failed".
        snapshot: The rank's last state; published ones may arrive late.
        home: The payload of trained tensors, from rank 0.
        failure: What went wrong.
        ranks: How many there are to be from here on, where that was asked for; else 0.
    """

    rank: int
    state: str
    snapshot: RankState | None = None
    result: Any = None
    failure: Failure | None = None
    ranks: int = 0

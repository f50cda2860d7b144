"""The outcome of a run on one rank, as its engine sends it to the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nbdist.engine.failure import Failure
from nbdist.telemetry import RankState

__all__ = ["Outcome"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended on one rank.

    Args:
        rank: The rank.
        state: "finished", "stopped", "scaled" or "failed".
        snapshot: The rank's last state; published ones may arrive late.
        result: The payload of trained tensors, from rank 0; or of outputs, from the rank that has gathered them.
        failure: What failed, if anything.
        ranks: The number of ranks to continue with after a scale command; else 0.
    """

    rank: int
    state: str
    snapshot: RankState | None = None
    result: Any = None
    failure: Failure | None = None
    ranks: int = 0

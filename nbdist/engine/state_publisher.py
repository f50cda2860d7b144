"""How a rank publishes its states: on a status board in the memory of its host."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbdist.engine.status_board import Board
from nbdist.telemetry import RankState, RankStateSink

__all__ = ["StatePublisher"]


@dataclass(frozen=True)
class StatePublisher:
    """What ranks publish the states of one run with; travels to the engines with the call of `train`."""

    records: Path
    """The folder of all records on the kernel's host."""
    host_id: str
    """The kernel's host."""
    boards: tuple[str, ...]
    """The path of each rank's status board, on its host."""

    def sink(self, rank: int) -> RankStateSink:
        """A sink that publishes the state of a rank. Local, on that rank's engine."""
        board = Board(self.boards[rank])

        def publish(state: dict[str, Any]) -> None:
            # A state that does not fit (thousands of rows) is dropped: the outcome holds the last one.
            board.write(json.dumps(state).encode(), seldom=RankState.is_whole(state))

        return RankStateSink(rank, publish)

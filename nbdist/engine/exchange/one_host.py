"""The exchange on one host: values and states lie in shared memory that kernel and engines map."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from nbdist.core.transfer.payload import Holder, Segment
from nbdist.engine.exchange.exchange import Exchange, StatePublisher, StateReader
from nbdist.engine.exchange.status_board import BOARD_BYTES, Board
from nbdist.telemetry import RankState, RankStateSink
from nbdist.telemetry.host import host_id
from nbdist.telemetry.record import records

__all__ = ["OneHost"]


@dataclass(frozen=True)
class _BoardPublisher(StatePublisher):
    boards: tuple[str, ...]
    """The path of each rank's status board."""

    def sink(self, rank: int) -> RankStateSink:
        board = Board(self.boards[rank])

        def publish(state: dict[str, Any]) -> None:
            # A state that does not fit (thousands of rows) is dropped: the outcome holds the last one.
            board.write(json.dumps(state).encode(), seldom=RankState.is_whole(state))

        return RankStateSink(rank, publish)


class _BoardReader(StateReader):
    def __init__(self, segments: list[Segment]) -> None:
        self._segments = segments
        self.paths = [segment.path for segment in segments]
        self._boards = [Board(path) for path in self.paths]
        self.publisher = _BoardPublisher(records().resolve(), host_id(), tuple(self.paths))

    def read(self, rank: int, published: Callable[[], Any]) -> list[dict[str, Any]]:
        return [json.loads(data) for data in self._boards[rank].read()]

    def close(self) -> None:
        for segment in self._segments:
            segment.close()


class OneHost(Exchange):
    """Kernel and engines run on one host."""

    shares_memory = True

    def state_reader(self, ranks: int, holder: Holder | None, paths: Sequence[str] = ()) -> StateReader:
        """A reader of status boards."""
        old = [Segment(BOARD_BYTES, holder, path) for path in paths]
        return _BoardReader(old or [Segment(BOARD_BYTES, holder) for _ in range(ranks)])

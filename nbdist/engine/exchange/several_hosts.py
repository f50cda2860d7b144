"""The exchange across several hosts: values and states travel in ipyparallel's messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ipyparallel.datapub import publish_data

from nbdist.core.transfer.payload import Holder
from nbdist.engine.exchange.exchange import Exchange, StatePublisher, StateReader
from nbdist.telemetry import RankStateSink
from nbdist.telemetry.host import host_id
from nbdist.telemetry.record import records

__all__ = ["SeveralHosts"]

_INTERVAL_S = 0.2
"""A message costs about 1 ms of CPU time in each of three processes, so states are published less often."""


class _MessagePublisher(StatePublisher):
    def sink(self, rank: int) -> RankStateSink:
        def publish(state: dict[str, Any]) -> None:
            publish_data({"nbdist": state})

        # The kernel sees the newest message only, so each holds the whole state.
        return RankStateSink(rank, publish, interval_s=_INTERVAL_S, whole_every_s=0.0)


class _MessageReader(StateReader):
    def __init__(self) -> None:
        self.paths = []
        self.publisher = _MessagePublisher(records().resolve(), host_id())

    def read(self, rank: int, published: Callable[[], Any]) -> list[dict[str, Any]]:
        newest = published()
        return [newest["nbdist"]] if isinstance(newest, dict) and "nbdist" in newest else []

    def close(self) -> None:
        pass


class SeveralHosts(Exchange):
    """Some engine runs on another host than the kernel."""

    shares_memory = False

    def state_reader(self, ranks: int, holder: Holder | None, paths: Sequence[str] = ()) -> StateReader:
        """A reader of messages; it has no paths."""
        return _MessageReader()

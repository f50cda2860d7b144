"""Exchange: what kernel and engines can use to exchange values and states, by the hosts that they run on."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nbdist.core.transfer.payload import Holder, Payload, Segment, SegmentCache, pack
from nbdist.telemetry import RankStateSink

__all__ = ["Exchange", "StatePublisher", "StateReader"]


@dataclass(frozen=True)
class StatePublisher(abc.ABC):
    """What ranks publish the states of one run with; travels to the engines with the call of `train`."""

    records: Path
    """The folder of all records on the kernel's host."""
    host_id: str
    """The kernel's host."""

    @abc.abstractmethod
    def sink(self, rank: int) -> RankStateSink:
        """A sink that publishes the state of a rank. Local, on that rank's engine."""


class StateReader(abc.ABC):
    """Reads the states of the ranks of one run, in the kernel.

    Attributes:
        publisher: Its counterpart, for the engines.
        paths: What another kernel needs to read on; see `Exchange.state_reader`.
    """

    publisher: StatePublisher
    paths: list[str]

    @abc.abstractmethod
    def read(self, rank: int, published: Callable[[], Any]) -> list[dict[str, Any]]:
        """The states that a rank has published since the last call, for `RankState.from_dict`; the newest last.

        Args:
            rank: The rank.
            published: Returns the newest value that its call of `train` has published.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Free what this holds."""


class Exchange(abc.ABC):
    """How values and states are exchanged. Has no state, and can be pickled: engines get it with a call."""

    shares_memory: ClassVar[bool]
    """Whether all engines can map memory of the kernel's host: snapshots are kept there."""

    def pack(
        self, value: Any, *, names: Mapping[str, Any] | None = None, segment_cache: SegmentCache | None = None,
        registries: bool = False,
    ) -> tuple[Payload, Segment]:  # fmt: skip
        """`pack` of `nbdist.core.transfer.payload`; where memory is not shared, the payload holds the bytes too."""
        return pack(
            value, names=names, inline=not self.shares_memory, segment_cache=segment_cache, registries=registries
        )

    @abc.abstractmethod
    def state_reader(self, ranks: int, holder: Holder | None, paths: Sequence[str] = ()) -> StateReader:
        """A reader for the states of a run. Local, in the kernel.

        Args:
            ranks: How many.
            holder: The process that also holds the memory, see `Segment`.
            paths: Those of an earlier kernel's reader, to read on; by default it is a new one.
        """

"""EngineClient: how the kernel reaches engines. What knows the messages behind it is one class in `cluster/launch`."""

from __future__ import annotations

import abc
from collections.abc import Collection

from nbdist.cluster.calls.pending_call import PendingCall

__all__ = ["EngineClient"]


class EngineClient(abc.ABC):
    """Starts calls and cells on engines, which have ids, and signals them. Local to the kernel, thread-safe.

    Each engine runs what it is sent in the order in which it was sent. An id is never used again.
    """

    @abc.abstractmethod
    def connect(self) -> None:
        """Connect, before anything else.

        Raises:
            ClusterError: The other side does not answer.
        """

    @property
    @abc.abstractmethod
    def ids(self) -> list[int]:
        """The engines known to be alive: registered, and not dead. None before `connect` and after `close`."""

    @abc.abstractmethod
    def start_call(self, engine: int, name: str, *arguments: object) -> PendingCall:
        """Start a call of a function of `nbdist.engine.remote_calls`.

        Raises:
            EngineDied: The engine is not alive.
            ClusterError: The client is not connected.
        """

    @abc.abstractmethod
    def start_cell(self, engine: int, source: str) -> PendingCall:
        """Start a cell in the engine's namespace; raises what `start_call` raises."""

    @abc.abstractmethod
    def send_signal(self, engine: int, number: int) -> None:
        """Send a signal to an engine's process, on whichever host; does nothing if it is not alive."""

    @abc.abstractmethod
    def wait_until_dead(self, engines: Collection[int], timeout_s: float) -> bool:
        """Wait until none of the engines is alive as `ids` has it; returns whether that is so."""

    @abc.abstractmethod
    def declare_dead(self, engines: Collection[int]) -> None:
        """Count engines as dead from now on, whose host is lost: nobody there can say so. Their calls fail at once."""

    @abc.abstractmethod
    def look_again(self) -> bool:
        """Find engines whose registration or death was missed while it connected; returns whether there were any."""

    @abc.abstractmethod
    def close(self) -> None:
        """Disconnect; the engines live on. Twice is fine."""

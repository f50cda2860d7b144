"""Host: a machine that runs engines, as the kernel sees it."""

from __future__ import annotations

import abc
import concurrent.futures
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from traceback import FrameSummary

from nbdist.errors import ClusterError

__all__ = ["ALL_LOST", "EngineEnvironment", "Host", "HostFacts", "HostLostError"]

ALL_LOST = "all hosts are lost: %dist_stop, then %dist_start."

EngineEnvironment = dict[str, str]
"""Variables of an engine's process: how it reaches the controller, and what it inherits from the kernel."""


class HostLostError(ClusterError):
    """A host has vanished, or its agent has ended."""


@dataclass(frozen=True, kw_only=True)
class HostFacts:
    """What is known of a host. Made of plain data.

    Args:
        name: As the user names it; of the notebook's own, its network name.
        host_id: Identifies the running system, see `nbdist.telemetry.host`.
        cores: CPU cores that its engines may use, together.
        gpus: How many GPUs torch sees there.
        address: Where the other hosts reach it; empty if there are none.
        interface: The network interface with that address.
        python: The Python that runs there.
        versions: Of Python, torch, ipyparallel and nbdist there, by name.
    """

    name: str
    host_id: str
    cores: int
    gpus: int = 0
    address: str = ""
    interface: str = ""
    python: str = ""
    versions: dict[str, str] = field(default_factory=dict)


class Host(abc.ABC):
    """A host. Safe to use from several threads.

    A process there is named by its mark, see `process_mark`.
    """

    name: str
    """As the user names it."""
    here: bool
    """Whether it is this process's own, which maps the memory of the processes there."""

    @property
    @abc.abstractmethod
    def facts(self) -> HostFacts:
        """What is known of it, once it has answered.

        Raises:
            ClusterError: It cannot be reached, or its environment is another one.
        """

    @property
    @abc.abstractmethod
    def lost(self) -> bool:
        """Whether it has vanished, and all that ran there."""

    @abc.abstractmethod
    def start_engines(self, count: int, environment: EngineEnvironment) -> concurrent.futures.Future[list[str]]:
        """Start engine processes; the result are their marks. They register with the controller later."""

    @abc.abstractmethod
    def processes(self) -> set[str]:
        """The engine processes that have been started there and have not ended."""

    @abc.abstractmethod
    def runs(self, mark: str) -> bool:
        """Whether a process has not ended, as far as is known. Returns at once."""

    @abc.abstractmethod
    def send_signal(self, mark: str, number: int) -> None:
        """Send a signal to a process, if it has not ended; it is delivered when this returns, or the host is lost."""

    @abc.abstractmethod
    def stack(self, mark: str, path: str) -> tuple[list[FrameSummary] | None, bool]:
        """Where a process's main thread is, see `stack_dump.request`; and whether the process is stopped.

        Args:
            mark: The process.
            path: The file on that host for its stack dumps.
        """

    @abc.abstractmethod
    def memory(self, mark: str) -> int:
        """The resident memory of a process, in bytes; 0 if it has ended, or the host is lost."""

    @abc.abstractmethod
    def hold(self, count: int) -> list[str]:
        """Create empty shared memory, which its processes open by path and may enlarge; returns the paths.

        Raises:
            HostLostError: The host is lost; so does each of the following.
        """

    @abc.abstractmethod
    def begin_read(self, places: Sequence[tuple[str, int, int]]) -> concurrent.futures.Future[list[bytes]]:
        """Read memory there, held or of its processes: for each place its path, a first byte and a length.

        The result is less where the memory ends; together it should be no more than some MiB. It fails with
        `ClusterError` if memory is gone, and with `HostLostError`.
        """

    def read_memory(self, places: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """`begin_read` and wait, of any size."""
        return self.begin_read(places).result()

    def stream_memory(self, path: str, nbytes: int) -> Iterator[bytes]:
        """Read the beginning of memory part by part, in order; raises what `begin_read` fails with."""
        yield from self.read_memory([(path, 0, nbytes)])

    @abc.abstractmethod
    def write_memory(self, path: str, start: int, content: bytes | memoryview) -> None:
        """Write memory that is held there, and enlarge it where it ends."""

    @abc.abstractmethod
    def empty(self, paths: Sequence[str]) -> None:
        """Free memory, but hold its paths. No process may be using it."""

    @abc.abstractmethod
    def release(self, paths: Sequence[str]) -> None:
        """Free memory, and its paths; does nothing where the host is lost."""

    @abc.abstractmethod
    def read_records(self, run_id: str, starts: Sequence[tuple[int, int]]) -> concurrent.futures.Future[list[bytes]]:
        """What ranks have recorded of a run there; empty where there is no more, and at most a MiB each.

        Args:
            run_id: The run.
            starts: Each rank, and from which byte on.

        Ranks of the notebook's own host write into its folder of records instead.
        """

    @abc.abstractmethod
    def open_socket(self) -> str:
        """Listen for one process there; returns the path, for the following. See `HostSocket`."""

    @abc.abstractmethod
    def receive(self, path: str, within_s: float) -> bytes | None:
        """See `HostSocket.receive`; it raises that too."""

    @abc.abstractmethod
    def send(self, path: str, data: bytes) -> None:
        """See `HostSocket.send`."""

    @abc.abstractmethod
    def close_socket(self, path: str) -> None:
        """See `HostSocket.close`; does nothing where the host is lost."""

    @abc.abstractmethod
    def log_tail(self) -> str:
        """The end of each engine's log."""

    @abc.abstractmethod
    def begin_end(self) -> None:
        """Begin to `end`, without waiting. Twice is fine."""

    @abc.abstractmethod
    def end(self) -> None:
        """Kill all that was started there. Twice is fine."""

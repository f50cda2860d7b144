"""Another host, through its agent."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from traceback import FrameSummary
from typing import Any, TypeVar

from nbdist.cluster.hosts.agents import Agents
from nbdist.cluster.hosts.host import EngineEnvironment, Host, HostFacts
from nbdist.cluster.hosts.local_host import versions
from nbdist.cluster.hosts.proxied_agents import ProxiedAgents
from nbdist.errors import ClusterError

__all__ = ["RemoteHost"]

_T = TypeVar("_T")
_Reply = tuple[Any, list[bytes]]
_ENDED_WITHIN_S = 2.0
_REPLY_WITHIN_S = 10.0
_PIECE_BYTES = 1 << 18
_AT_A_TIME = 8
"""Of memory: the size of a piece, and how many are on their way; so a beat never waits long behind them."""


class RemoteHost(Host):
    """See `Host`. `facts` waits for its agent. One cluster after another may use it.

    Args:
        name: As the user names it.
        identity: Of its agent.
        agents: To whom that connects.
    """

    here = False

    def __init__(self, name: str, identity: str, agents: Agents | ProxiedAgents) -> None:
        self.name = name
        self._agents = agents
        self._lock = threading.Lock()
        self._facts: HostFacts | None = None
        self.begin()
        self.identity = identity
        agents.follow(identity, self._note, lambda: self.on_lost(self))

    def adopt(self) -> None:
        """Count the engines there as started, that an earlier kernel has started."""
        self._started.update(self._call("processes"))

    def begin(
        self, timeout_s: float = 60.0, on_lost: Callable[[RemoteHost], None] = lambda host: None,
        on_terminated: Callable[[RemoteHost], None] = lambda host: host.hang_up(),
    ) -> None:  # fmt: skip
        """A cluster begins to use it.

        Args:
            timeout_s: How long the agent may take to answer first, in seconds.
            on_lost: Called once the host is lost, in a thread.
            on_terminated: Called once the host has to be left, as before a job of Slurm ends, in a thread: it is when
                its agent is told to `hang_up`, or a while later.
        """
        self._timeout_s, self.on_lost, self.on_terminated = timeout_s, on_lost, on_terminated
        self._started, self._ended = set[str](), set[str]()
        self._cluster_ended: concurrent.futures.Future[_Reply] | None = None

    @property
    def started(self) -> set[str]:
        """All processes that were started there."""
        with self._lock:
            return self._started | self._ended

    def note_ended(self, marks: Iterable[str]) -> None:
        """Processes there have ended: those of an earlier agent."""
        with self._lock:
            self._ended.update(marks)

    @property
    def facts(self) -> HostFacts:
        """See `Host`."""
        if self._facts is None:
            try:
                facts = HostFacts(**self._agents.hello(self.identity).result(self._timeout_s))
            except concurrent.futures.TimeoutError:
                raise ClusterError(
                    f"host {self.name} did not answer within {self._timeout_s:g} s: raise --timeout, or look whether "
                    "it may connect to this host (a firewall?)."
                ) from None
            self._check_versions(facts)
            self._facts = facts
        return self._facts

    @property
    def answered(self) -> bool:
        """Whether its facts are known here."""
        return self._facts is not None

    def _check_versions(self, facts: HostFacts) -> None:
        own = versions()
        if other := [name for name in own if facts.versions.get(name) != own[name]]:
            differing = ", ".join(f"{name} {facts.versions.get(name, 'is missing')}" for name in other)
            here = ", ".join(f"{name} {own[name]}" for name in other)
            raise ClusterError(
                f"host {self.name} has another environment: {differing} in {facts.python}, and here {here}. Install "
                "the same there, or choose another Python with c.SSHEngineLauncher.remote_python."
            )

    def _note(self, event: Sequence[Any]) -> None:
        kind, *about = event
        if kind == "ended":
            with self._lock:
                self._ended.update(about)
        elif kind == "terminated":
            self.on_terminated(self)

    @property
    def lost(self) -> bool:
        """See `Host`."""
        return self._agents.lost(self.identity)

    def start_engines(self, count: int, environment: EngineEnvironment) -> concurrent.futures.Future[list[str]]:
        """See `Host`; fails with `HostLostError`."""

        def note(reply: _Reply) -> list[str]:
            with self._lock:
                self._started.update(reply[0])
            return list(reply[0])

        return _then(self._request("start_engines", count, environment, os.getcwd()), note)

    def processes(self) -> set[str]:
        """See `Host`."""
        with self._lock:
            return set() if self.lost else self._started - self._ended

    def runs(self, mark: str) -> bool:
        """See `Host`."""
        return not self.lost and mark not in self._ended

    def send_signal(self, mark: str, number: int) -> None:
        """See `Host`."""
        with contextlib.suppress(ClusterError):  # it is lost, or the process is: the signal has nothing to do
            self._call("send_signal", mark, number)

    def stack(self, mark: str, path: str) -> tuple[list[FrameSummary] | None, bool]:
        """See `Host`."""
        try:
            frames, stopped = self._call("stack", mark, path)
        except ClusterError:
            return None, False
        if frames is not None:
            frames = [FrameSummary(file, number, name, line=line) for file, number, name, line in frames]
        return frames, stopped

    def memory(self, mark: str) -> int:
        """See `Host`."""
        with contextlib.suppress(ClusterError):
            return int(self._call("memory", mark))
        return 0

    def hold(self, count: int) -> list[str]:
        """See `Host`."""
        return list(self._call("hold", count))

    def begin_read(self, places: Sequence[tuple[str, int, int]]) -> concurrent.futures.Future[list[bytes]]:
        """See `Host`."""
        return _then(self._request("read_memory", list(places)), lambda reply: reply[1])

    def read_memory(self, places: Sequence[tuple[str, int, int]]) -> list[bytes]:
        """See `Host`; large places are read piece by piece."""
        pieces = [list(_pieces(start, length)) for _, start, length in places]
        requests = [(path, *piece) for (path, _, _), own in zip(places, pieces, strict=True) for piece in own]
        read = iter(self._stream("read_memory", [([list(group)], ()) for group in _grouped(requests)]))
        return [b"".join(itertools.islice(read, len(own))) for own in pieces]

    def stream_memory(self, path: str, nbytes: int) -> Iterator[bytes]:
        """See `Host`; a few pieces are on their way."""
        return self._stream("read_memory", [([[(path, *piece)]], ()) for piece in _pieces(0, nbytes)])

    def write_memory(self, path: str, start: int, content: bytes | memoryview) -> None:
        """See `Host`; piece by piece."""
        view = memoryview(content)
        pieces = [(first, view[first - start : first - start + size]) for first, size in _pieces(start, len(view))]
        for _ in self._stream("write_memory", [((path, first), (bytes(piece),)) for first, piece in pieces]):
            pass

    def empty(self, paths: Sequence[str]) -> None:
        """See `Host`."""
        self._call("empty", list(paths))

    def release(self, paths: Sequence[str]) -> None:
        """See `Host`."""
        with contextlib.suppress(ClusterError):
            self._call("release", list(paths))

    def _stream(self, kind: str, requests: Iterable[tuple[Sequence[Any], Sequence[bytes]]]) -> Iterator[bytes]:
        """Send requests, a few at a time, and yield what comes back, in order."""
        pending: collections.deque[concurrent.futures.Future[_Reply]] = collections.deque()
        for arguments, frames in requests:
            if len(pending) == _AT_A_TIME:
                yield from self._reply(pending.popleft())[1]
            pending.append(self._request(kind, *arguments, frames=frames))
        while pending:
            yield from self._reply(pending.popleft())[1]

    def read_records(self, run_id: str, starts: Sequence[tuple[int, int]]) -> concurrent.futures.Future[list[bytes]]:
        """See `Host`; fails with `HostLostError`."""
        return _then(self._request("read_records", run_id, list(starts)), lambda reply: reply[1])

    def open_socket(self) -> str:
        """See `Host`."""
        return str(self._call("open_socket"))

    def receive(self, path: str, within_s: float) -> bytes | None:
        """See `Host`."""
        received = self._reply(self._request("receive", path, within_s))[1]
        return received[0] if received else None

    def send(self, path: str, data: bytes) -> None:
        """See `Host`."""
        self._reply(self._request("send", path, frames=[data]))

    def close_socket(self, path: str) -> None:
        """See `Host`."""
        with contextlib.suppress(ClusterError):
            self._call("close_socket", path)

    def log_tail(self) -> str:
        """See `Host`."""
        with contextlib.suppress(ClusterError):
            return str(self._call("log_tail"))
        return f"host {self.name} is lost."

    def _request(self, kind: str, *arguments: Any, frames: Sequence[bytes] = ()) -> concurrent.futures.Future[_Reply]:
        return self._agents.request(self.identity, kind, *arguments, frames=frames)

    def _call(self, kind: str, *arguments: Any) -> Any:
        return self._reply(self._request(kind, *arguments))[0]

    def _reply(self, request: concurrent.futures.Future[_Reply]) -> _Reply:
        try:
            return request.result(_REPLY_WITHIN_S)
        except concurrent.futures.TimeoutError:
            raise ClusterError(f"host {self.name} did not answer within {_REPLY_WITHIN_S:g} s.") from None

    def begin_end(self) -> None:
        """See `Host`. An agent that has answered goes on, without a cluster; one that has not ends."""
        if self._facts is None or self.lost:
            self.hang_up()
        elif self._cluster_ended is None:
            self._cluster_ended = self._request("end_cluster")

    def end(self) -> None:
        """See `Host`. Its agent may be used again where it `waits`."""
        self.on_lost = self.on_terminated = lambda host: host.hang_up()
        self.begin_end()
        if self._cluster_ended is not None:
            try:
                self._cluster_ended.result(_ENDED_WITHIN_S)
            except (ClusterError, concurrent.futures.TimeoutError):
                self.hang_up()
        if not self.waits:
            self.end_agent()

    @property
    def waits(self) -> bool:
        """Whether its agent waits for a cluster to begin."""
        ended = self._cluster_ended
        return ended is not None and ended.done() and ended.exception() is None and not self.lost

    def hang_up(self) -> None:
        """Tell the agent to end, without waiting for it."""
        self._agents.hang_up(self.identity)

    def end_agent(self) -> None:
        """End the agent, and with it all that it has started."""
        self._agents.end(self.identity)


def _then(replied: concurrent.futures.Future[_Reply], convert: Callable[[_Reply], _T]) -> concurrent.futures.Future[_T]:
    """What a reply is converted to, once it has come; fails as it does."""
    found: concurrent.futures.Future[_T] = concurrent.futures.Future()

    def note(reply: concurrent.futures.Future[_Reply]) -> None:
        try:
            found.set_result(convert(reply.result()))
        except Exception as error:
            found.set_exception(error)

    replied.add_done_callback(note)
    return found


def _pieces(start: int, length: int) -> Iterator[tuple[int, int]]:
    """Start and length of the pieces of a range; an empty range has one."""
    for first in range(start, start + max(length, 1), _PIECE_BYTES):
        yield first, min(_PIECE_BYTES, start + length - first)


def _grouped(places: Iterable[tuple[str, int, int]]) -> Iterator[tuple[tuple[str, int, int], ...]]:
    """Places, as many together as make a piece."""
    group: list[tuple[str, int, int]] = []
    for place in places:
        if group and sum(length for _, _, length in (*group, place)) > _PIECE_BYTES:
            yield tuple(group)
            group = []
        group.append(place)
    if group:
        yield tuple(group)

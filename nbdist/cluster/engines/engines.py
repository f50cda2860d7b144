"""Engines: processes with ranks that form a process group; calls, signals, replacement and resizing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from nbdist.cluster.calls.engine_client import EngineClient
from nbdist.cluster.calls.pending_call import EngineDied, PendingCall
from nbdist.cluster.calls.replies import wait_for_replies
from nbdist.cluster.engines.end_notice import EndNotice
from nbdist.cluster.engines.engine_info import Engine
from nbdist.cluster.engines.host_payloads import HostPayloads
from nbdist.cluster.engines.rank_table import RankTable
from nbdist.cluster.engines.spares import Spares
from nbdist.cluster.engines.world_forming import Forming, describe_engines
from nbdist.cluster.hosts.host import Host
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.cluster.launch.launcher import CONTROLLER_ENDED, STORE_ENDED, Launch
from nbdist.core.comm.rendezvous import GenerationStore
from nbdist.core.comm.world import SHARED_GPU
from nbdist.core.control.command_log import CommandLog
from nbdist.errors import ClusterError, EngineError, PeerLostError, ranks_text

__all__ = ["Engine", "Engines"]

_NOTICED_WITHIN_S = 1.0
_LOOK_S, _TRIES = 0.05, 3


class Engines:
    """Engine processes with ranks 0 ... size - 1. They are ready when all have completed a first collective.

    A rank's engine may change: a spare replaces a lost one.

    Args:
        launch: Their processes, which are registered.
        store: For their rendezvous.
        size: The number of ranks.
        device: "auto", "cpu" or "cuda".
        timeout_s: How long a replacement may take, in seconds.
        spares: How many spare engines to hold ready; not waited for.

    Attributes:
        payloads: What is sent to them and fetched from them.
    """

    def __init__(self, launch: Launch, store: Any, size: int, device: str, timeout_s: float, spares: int) -> None:
        self.size, self.end_notice = size, EndNotice(launch)
        self.owner, self._generation = os.getpid(), 0
        self.timeout_s, self.device, self.transport = timeout_s, device, ""
        self.formed = self.suspected = self.ended = False
        self.start_seconds = 0.0
        self._unanswered: dict[int, PendingCall] = {}
        self._changing = threading.RLock()
        self._launch, self._store, self.host_id = launch, store, launch.host_id
        self._table = RankTable(launch, size)
        self.payloads = HostPayloads(lambda rank: self.placed()[rank])
        self._spares = Spares(launch, spares, store.address)
        launch.on_lost, launch.on_back = self._host_lost, self.keep_spares

    def initialize(self) -> None:
        """Describe the engines that were just started, and form a world."""
        store = self._store.address  # not the store: an error's traceback would hold it, and its socket
        self._table.place_first(describe_engines(self.size, store, self.timeout_s, self.start_call, self.call))
        self.form()

    def take_over(self, state: dict[str, Any]) -> None:
        """Load the state that another kernel has left at the anchor."""
        self._table.place(list(zip(state["ids"], state["records"], strict=True)))
        self._generation, self.transport, self.formed = state["generation"], state["transport"], state["formed"]

    def _host_lost(self, host_id: str) -> None:
        """Fail what runs on a host that is lost. Takes no lock: whoever holds it may wait for just that."""
        self._client.declare_dead([*self._table.on_host(host_id), *self._spares.on_host(host_id)])

    @property
    def _client(self) -> EngineClient:
        return self._launch.client

    @property
    def _ids(self) -> list[int]:
        return self._table.ids

    @property
    def _records(self) -> list[Engine]:
        return self._table.records

    def _note(self) -> None:
        """Save at the anchor what another kernel needs to take over."""
        if self.anchor is not None:
            names = {"ids": self._ids, "records": self._records, "generation": self._generation, "size": self.size}
            own = {"device": self.device, "timeout_s": self.timeout_s, "spares": self._spares.wanted}
            self.anchor.note("engines", {**names, **own, "transport": self.transport, "formed": self.formed})

    @property
    def anchor(self) -> Anchor | None:
        """The process that they outlive this kernel with; None if they end with it."""
        return self._launch.anchor

    @property
    def hosts(self) -> list[Host]:
        """The hosts that are not lost."""
        return self._launch.living()

    def host_of(self, record: Engine) -> Host | None:
        """The host of an engine; None if it is not of this launch."""
        return self._launch.host_of(record.host_id)

    def records(self, busy: bool = False) -> list[Engine]:
        """One record per engine, in rank order; `busy`: whether those alive are busy or idle."""
        return self._table.states(busy=busy)

    @property
    def processes(self) -> dict[int, tuple[str, str]]:
        """The process of each rank: host id and mark. So a replaced engine is told from the one before."""
        return {record.rank: (record.host_id, record.mark) for record in self._records}

    @property
    def lost(self) -> list[int]:
        """Ranks whose process has ended."""
        return [record.rank for record in self.records() if record.state == "lost"]

    def spares(self) -> list[Engine]:
        """One record per spare that is ready."""
        with self._changing:
            return [self._table.record(facts) for facts in self._spares.ready(self._ids).values()]

    def keep_spares(self, wanted: int | None = None) -> None:
        """Start or kill spares in the background, until there are as many as wanted; `wanted` changes that number."""
        if wanted is not None:
            self._spares.wanted = wanted
        threading.Thread(target=self._refill, daemon=True, name="nbdist-spares").start()

    def _refill(self) -> None:
        """Start missing spares; where one ends while it starts, another one."""
        for _ in range(_TRIES):
            started = set[tuple[str, str]]()
            with self._changing, contextlib.suppress(ClusterError):  # the next replacement raises it again
                if not self.ended:
                    started = self._spares.refill(self._ids, self.processes.values())
            while started and all(self._launch.runs(*process) for process in started):
                time.sleep(_LOOK_S)
                with self._changing, contextlib.suppress(ClusterError):
                    ready = [] if self.ended else self.spares()
                    started -= {*self.processes.values(), *((spare.host_id, spare.mark) for spare in ready)}
            if not started or self.ended:
                return

    def _has_ended(self) -> bool:
        self.check_alive()
        return self.ended

    @property
    def reachable(self) -> bool:
        """Whether the controller and the store, which every call needs, are alive."""
        return self._launch.controller_runs and ((store := self._store) is None or store.lives)

    def check_alive(self) -> None:
        """Make sure that the engines can be reached, and that calls of those that have ended fail.

        Whoever waits for engines calls this again and again.

        Raises:
            ClusterError: The controller or the store has ended.
        """
        self._table.declare_ended()
        if not self.reachable:
            raise ClusterError(STORE_ENDED if self._launch.controller_runs else CONTROLLER_ENDED)

    @property
    def threads(self) -> int:
        """Default CPU threads per rank: the cores of its host divided by the ranks there."""
        ranks = self._table.by_host
        return min(max(1, record.cores // len(ranks[record.host_id])) for record in self._records)

    def placed(self) -> dict[int, Host | None]:
        """The host of each rank; None for one that is not of this launch, and shares this kernel's memory."""
        return {record.rank: self.host_of(record) for record in self._records}

    def by_host(self) -> dict[Host | None, list[int]]:
        """The ranks on each host, see `placed`."""
        found: dict[Host | None, list[int]] = {}
        for host_id, ranks in self._table.by_host.items():
            found.setdefault(self._launch.host_of(host_id), []).extend(ranks)
        return found

    @property
    def share_memory(self) -> bool:
        """Whether all of them can map memory of the kernel's host."""
        return all(host is None or host.here for host in self.by_host())

    @property
    def store(self) -> Any:
        """The ranks' store; None if it has ended."""
        return self._store if self._store is not None and self._store.lives else None

    def commands(self, run_id: str) -> Any:
        """The `CommandLog` of a run, which rank 0 reads; None if the store has ended."""
        return None if self.store is None else CommandLog(self.store, run_id)

    def dissolve(self) -> None:
        """The ranks have left their world, or will: another is formed before their next collective."""
        self.formed = False

    def release(self) -> None:
        """Release the ranks of the current world: each that waits at the store raises at once."""
        self.formed = False
        if (store := self._store) is not None:  # else ended
            with contextlib.suppress(PeerLostError):  # the store is gone, and so its waits
                GenerationStore(store, self._generation).release()

    def form(self) -> None:
        """Form a world of all engines: a new process group (generation N+1).

        Raises:
            EngineError: It failed on a rank, or one was lost. The others have left the world, and may form another.
            ClusterError: They did not join in time.
        """
        self.release()
        self._generation += 1
        self._note()
        records, threads = self._records, self.threads
        local = {rank: (i, len(ranks)) for ranks in self._table.by_host.values() for i, rank in enumerate(ranks)}
        forming = Forming(
            lost=lambda: self.lost, check_alive=self.check_alive, release=self.release, kill=self.kill,
            timeout_s=self.timeout_s,
        )  # fmt: skip
        try:
            for record in records:
                arguments = self._generation, record.rank, self.size, *local[record.rank], self.device, threads
                forming.calls[record.rank] = self.start_call(record.rank, "join", *arguments)
            formed = forming.wait()
        except BaseException:
            forming.abort()
            raise
        devices = [replace(record, device=formed[record.rank]["device"]) for record in records]
        self._table.place(list(zip(self._ids, devices, strict=True)))
        self.transport = formed[0]["transport"] + (f" ({self._launch.interface})" if self._launch.interface else "")
        self.formed, self.suspected = True, False
        self._note()
        self.keep_spares()
        if formed[0]["shares_gpu"]:
            warnings.warn(SHARED_GPU, stacklevel=1)  # always this line, so that Python shows it once

    def check_size(self, engines: int) -> None:
        """See `Launch.check_size`."""
        self._launch.check_size(engines, torch.cuda.device_count())

    def ensure_ready(self) -> None:
        """Make sure that all engines are alive and idle; form a new world if the last one failed.

        Raises:
            ClusterError: They are not.
        """
        self.check_alive()
        if self.lost:
            raise ClusterError(
                f"the engine of {ranks_text(self.lost)} is lost: %dist_start (or cluster.start()) replaces it."
            )
        if self.stuck:
            raise ClusterError(
                f"{ranks_text(self.stuck)} did not react to an interrupt and still runs its cell, perhaps inside a "
                "collective: %dist_stop ends it."
            )
        if not self.formed:
            self.form()

    def kill(self, ranks: Iterable[int]) -> None:
        """Kill the processes of ranks; they are lost when this returns."""
        self._client.wait_until_dead(self._signal(signal.SIGKILL, ranks), _NOTICED_WITHIN_S)

    def replace_lost(self, report: Callable[[str], None] = lambda text: None, return_home: bool = False) -> list[int]:
        """Replace lost ranks by spares or new engines; returns which. A world has to be formed afterwards.

        With `return_home`, ranks too whose own host was lost and is back.

        Raises:
            ClusterError: There are no spares, and new engines were not ready in time.
        """
        with self._changing:
            if return_home:
                self.kill([one.rank for one in self._records if not self._launch.at_home(one.rank, one.host_id)])
            return self.resize(self.size, report) if self.lost else []

    def resize(self, size: int, report: Callable[[str], None] = lambda text: None) -> list[int]:
        """Change the number of ranks, and replace lost ones; see `replace_lost`.

        Engines of ranks beyond `size` take free ranks, or are killed; spares take the ranks that are still free.
        """
        with self._changing:
            lost = self.lost
            living = [rank for rank in range(self.size) if rank not in lost]
            free = [rank for rank in range(size) if rank not in living]
            beyond = [rank for rank in living if rank >= size]
            moved = [(self._ids[rank], self._records[rank]) for rank in beyond[: len(free)]]
            for rank in lost:
                self._spares.mark_dead(self._ids[rank])
            if missing := free[len(moved) :]:
                now = [record.host_id for record in self._records]
                places = [self._launch.home(rank) or (now[rank] if rank < self.size else "") for rank in missing]
                processes = list(self.processes.values())
                taken = self._spares.take(places, self._ids, processes, self.timeout_s, report, self._has_ended)
                moved += [(engine_id, self._table.record(facts)) for engine_id, facts in taken]
            self.formed = False
            self.kill(gone := beyond[len(free) :])
            for rank in gone:
                self._spares.mark_dead(self._ids[rank])
            by_rank = dict(enumerate(zip(self._ids, self._records, strict=True))) | dict(zip(free, moved, strict=True))
            self._table.place([by_rank[rank] for rank in range(size)])
            self.size = size
            self._note()
            return free

    def start_call(self, rank: int, name: str, *arguments: Any) -> PendingCall:
        """Start a call of a function of `remote_calls` on one engine.

        Raises:
            EngineError: The engine is lost.
        """
        with _lost(rank):
            return self._client.start_call(self._ids[rank], name, *arguments)

    def start_cell(self, rank: int, source: str) -> PendingCall:
        """Start a cell on one engine; raises what `start_call` raises."""
        with _lost(rank):
            return self._client.start_cell(self._ids[rank], source)

    def call(
        self, ranks: Iterable[int], name: str, arguments: Any = (), *, timeout_s: float | None = None
    ) -> dict[int, Any]:  # fmt: skip
        """Call a function of `remote_calls` on engines and wait; `arguments` are a tuple for all, or one a rank.

        Raises:
            ClusterError: An engine did not answer in time, or cannot be reached.
            EngineError: The function raised on one.
        """
        of = arguments.__getitem__ if isinstance(arguments, dict) else lambda rank: arguments
        calls = {rank: self.start_call(rank, name, *of(rank)) for rank in ranks}
        return wait_for_replies(calls, self.check_alive, timeout_s)

    def interrupt(self, ranks: Iterable[int]) -> None:
        """Interrupt ranks, as Ctrl-C would. The signals are delivered when this returns."""
        self._signal(signal.SIGINT, ranks)

    def _signal(self, number: signal.Signals, ranks: Iterable[int]) -> list[int]:
        """Send a signal to the ranks that are alive; returns the ids of their engines."""
        living = self._table.living()
        targets = [living[rank] for rank in ranks if rank in living]
        for engine_id, record in targets:
            if (host := self.host_of(record)) is not None:
                host.send_signal(record.mark, number)
            else:
                self._client.send_signal(engine_id, number)
        return [engine_id for engine_id, _ in targets]

    def suspect(self, unanswered: dict[int, PendingCall]) -> None:
        """A cell failed, perhaps within a collective: the next run forms a new world.

        Cells continue in the current one, in which the user may have groups and wrapped models.

        Args:
            unanswered: Calls by rank that an interrupt did not end.
        """
        self.suspected = True
        self._unanswered = unanswered

    @property
    def stuck(self) -> list[int]:
        """Ranks that still run a cell that was interrupted."""
        return [rank for rank, call in self._unanswered.items() if not call.done()]

    def end(self) -> None:
        """Kill the processes. Twice is fine; does nothing in a forked child of their owner."""
        if self.owner != os.getpid():
            return
        self.ended = True
        self.release()
        self._store = None  # an old Run may hold this object, but must not hold a socket open
        with self._changing:  # waits for a spare that is being started, so that it is ended too
            self._launch.end()


@contextlib.contextmanager
def _lost(rank: int) -> Iterator[None]:
    """Tell the user, where an engine turns out to be dead, which rank that is."""
    try:
        yield
    except EngineDied:
        raise EngineError(f"rank {rank}: the engine's process has ended.", rank=rank) from None

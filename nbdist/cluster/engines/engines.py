"""The engines: processes with ranks, that have met in a world."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import ipyparallel.error
import psutil

from nbdist.cluster.engines.engine import Engine, gone
from nbdist.cluster.engines.forming import Forming, introduce
from nbdist.cluster.engines.replies import answers_of
from nbdist.cluster.engines.standby import Spares
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.cluster.launch.launcher import CONTROLLER_ENDED, STORE_ENDED, Launch
from nbdist.core.comm.rendezvous import GenerationStore
from nbdist.core.comm.world import SHARED_GPU
from nbdist.core.control.command_log import CommandLog
from nbdist.engine import trampoline
from nbdist.errors import ClusterError, EngineError, PeerLostError, ranks_text
from nbdist.telemetry.host import host_id

__all__ = ["Engine", "Engines"]

_KNOWN_WITHIN_S = 1.0
_POLL_S = 0.005


class Engines:
    """Engine processes with ranks 0 ... size - 1. They are ready when all of them have met in a collective.

    Which engine has which rank may change: one that is lost is followed by a spare.

    Args:
        launch: Their processes, that are registered.
        store: In which they meet.
        size: How many.
        device: "auto", "cpu" or "cuda".
        timeout_s: How long a replacement may take, in seconds.
        spares: How many engines without a rank to keep beside them; nobody waits for those.
    """

    def __init__(self, launch: Launch, store: Any, size: int, device: str, timeout_s: float, spares: int) -> None:
        self.size = size
        self.owner = os.getpid()
        self.timeout_s = timeout_s
        self.device = device
        self.transport = ""
        self.home = ""  # where the last weights came home from
        self.formed = self.suspected = self.ended = False
        self.start_seconds = 0.0
        self._unanswered: dict[int, Any] = {}
        self._changing = threading.RLock()
        self._generation = 0
        self._launch = launch
        # ipyparallel's number of each rank's engine, and what is known of it: changed at once, for other threads.
        self._seats: tuple[list[int], list[Engine]] = sorted(launch.ids)[:size], []
        self._store = store
        self.host_id = launch.host_id = host_id()
        self._spares = Spares(launch, spares, store.address)

    def meet(self) -> None:
        """Let engines that were just started get to know where they are, and form a world."""
        store = self._store.address  # not itself: an error would keep it, and its socket
        self._records = introduce(self.size, store, self.timeout_s, self.start_call, self.call)
        self.form()

    def take_over(self, told: dict[str, Any]) -> None:
        """Know what another kernel knew, as it told the anchor."""
        self._seats, self._generation = (told["ids"], told["records"]), told["generation"]
        self.transport, self.formed = told["transport"], told["formed"]

    @property
    def folder(self) -> str:
        """Theirs on this host, which nobody else may enter; it goes with them."""
        return str(self._launch.folder)

    @property
    def _ids(self) -> list[int]:
        return self._seats[0]

    @property
    def _records(self) -> list[Engine]:
        return self._seats[1]

    @_records.setter
    def _records(self, records: list[Engine]) -> None:
        self._seats = self._seats[0], records

    def _note(self) -> None:
        """Tell the anchor what another kernel would have to know."""
        if self.anchor is not None:
            names = {"ids": self._ids, "records": self._records, "generation": self._generation, "size": self.size}
            own = {"device": self.device, "timeout_s": self.timeout_s, "spares": self._spares.wanted}
            self.anchor.note("engines", {**names, **own, "transport": self.transport, "formed": self.formed})

    @property
    def anchor(self) -> Anchor | None:
        """What holds them beyond this kernel; None where they end with it."""
        return self._launch.anchor

    def records(self, busy: bool = False) -> list[Engine]:
        """One record an engine, in rank order; `busy` is the state of those that live."""
        (ids, records), alive = self._seats, set(self._launch.ids)
        states = [
            ("busy" if busy else "idle") if self._lives(record, engine_id, alive) else "lost"
            for engine_id, record in zip(ids, records, strict=True)
        ]
        return [replace(record, state=state) for record, state in zip(records, states, strict=True)]

    @property
    def lost(self) -> list[int]:
        """Ranks whose process has ended."""
        return [record.rank for record in self.records() if record.state == "lost"]

    def _lives(self, record: Engine, engine_id: int, ids: set[int]) -> bool:
        """Whether an engine is registered among `ids` and has not died since, as one can see on this host."""
        here = record.host_id == self.host_id
        return engine_id in ids and not (here and gone(record.pid, record.born_s))

    def spares(self) -> list[Engine]:
        """One record a spare that has been heard of."""
        with self._changing:
            return [Engine(rank=-1, device="", **facts) for facts in self._spares.ready(self._ids).values()]

    def keep_spares(self, wanted: int | None = None) -> None:
        """Start spares until there are as many as wanted, in the background. A new number may be given."""
        if wanted is not None:
            self._spares.wanted = wanted
        threading.Thread(target=self._refill, daemon=True, name="nbdist-spares").start()

    def _refill(self) -> None:
        with self._changing:
            if not self.ended:
                with contextlib.suppress(ClusterError):  # without spares all goes on; who needs one meets the error
                    self._spares.refill(self._ids, [record.pid for record in self._records])

    def _over(self) -> bool:
        self.check_alive()
        return self.ended

    @property
    def reachable(self) -> bool:
        """Whether the processes live through which everything goes: the controller, and the store's."""
        return self._launch.controller_runs and ((store := self._store) is None or store.lives)

    def check_alive(self) -> None:
        """Make sure that the engines can be reached.

        Raises:
            ClusterError: They cannot: the controller has ended, or the store in which they meet.
        """
        if not self.reachable:
            raise ClusterError(STORE_ENDED if self._launch.controller_runs else CONTROLLER_ENDED)

    @property
    def threads(self) -> int:
        """CPU threads of a rank by default: its host's cores over the ranks there."""
        hosts = [record.host_id for record in self._records]
        return min(max(1, record.cores // hosts.count(record.host_id)) for record in self._records)

    @property
    def remote(self) -> bool:
        """Whether some engine lives on another host, where our shared memory does not reach."""
        return any(record.host_id != self.host_id for record in self._records)

    def commands(self, run_id: str) -> Any:
        """The log of what is asked of a run, an `CommandLog`; rank 0 reads it. None where nobody can any more."""
        store = self._store
        return CommandLog(store, run_id) if store is not None and store.lives else None

    def release(self) -> None:
        """Release the ranks of the present world: each that waits at the store for others gets an error at once."""
        self.formed = False
        if (store := self._store) is not None:  # else ended
            with contextlib.suppress(PeerLostError):  # the store is gone, so nobody waits there
                GenerationStore(store, self._generation).release()

    def form(self) -> None:
        """Let all engines meet in a world of a new generation.

        Raises:
            EngineError: It failed on a rank, or one was lost. The others have left the world, and may form another.
            ClusterError: They did not meet in time.
        """
        self.release()
        self._generation += 1
        self._note()
        records = self._records
        hosts = [record.host_id for record in records]
        forming = Forming(
            lost=lambda: self.lost, check_alive=self.check_alive, release=self.release, kill=self.kill,
            timeout_s=self.timeout_s,
        )  # fmt: skip
        try:
            for record in records:
                local_rank, local_size = hosts[: record.rank].count(record.host_id), hosts.count(record.host_id)
                where = self._generation, record.rank, self.size, local_rank, local_size, self.device, self.threads
                forming.calls[record.rank] = self.start_call(record.rank, "join", *where)
            formed = forming.wait()
        except BaseException:
            forming.give_up()
            raise
        self._records = [replace(record, device=formed[record.rank]["device"]) for record in records]
        self.transport = formed[0]["transport"]
        self.formed, self.suspected = True, False
        self._note()
        self.keep_spares()
        if formed[0]["shares_gpu"]:
            warnings.warn(SHARED_GPU, stacklevel=1)  # as from here, so that Python shows it once

    def ensure_ready(self) -> None:
        """Make sure that all engines live and listen; form a new world if the last one broke.

        Raises:
            ClusterError: They do not.
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
        """End the processes of ranks that do not react any more; they are lost when this returns."""
        ids = self._signal(signal.SIGKILL, ranks)
        deadline = time.monotonic() + _KNOWN_WITHIN_S
        while not set(self._launch.ids).isdisjoint(ids) and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def replace_lost(self, tell: Callable[[str], None] = lambda words: None) -> list[int]:
        """Give the ranks that were lost to spares, or to new engines. They have to `form` a world then.

        Returns:
            Those ranks.

        Raises:
            ClusterError: There are no spares, and new engines were not ready in time.
        """
        with self._changing:
            return self.resize(self.size, tell) if self.lost else []

    def resize(self, size: int, tell: Callable[[str], None] = lambda words: None) -> list[int]:
        """Have so many ranks, none of them lost; see `replace_lost`.

        Engines beyond that number take ranks that are free, or end; what is missing then comes from the spares.
        """
        with self._changing:
            lost = self.lost
            living = [rank for rank in range(self.size) if rank not in lost]
            free = [rank for rank in range(size) if rank not in living]
            beyond = [rank for rank in living if rank >= size]
            coming = [(self._ids[rank], self._records[rank]) for rank in beyond[: len(free)]]
            for rank in lost:
                self._spares.leave(self._ids[rank])
            if missing := len(free) - len(coming):
                pids = [record.pid for record in self._records]
                taken = self._spares.take(missing, self._ids, pids, self.timeout_s, tell, self._over)
                coming += [(engine_id, Engine(rank=-1, device="", **facts)) for engine_id, facts in taken.items()]
            self.formed = False
            self.kill(beyond[len(free) :])
            for rank in beyond[len(free) :]:
                self._spares.leave(self._ids[rank])
            seats = dict(enumerate(zip(self._ids, self._records, strict=True))) | dict(zip(free, coming, strict=True))
            chosen = [seats[rank] for rank in range(size)]
            self._seats = (
                [engine_id for engine_id, _ in chosen],
                [replace(record, rank=rank) for rank, (_, record) in enumerate(chosen)],
            )
            self.size = size
            self._note()
            return free

    def start_call(self, rank: int, name: str, *arguments: Any) -> Any:
        """Begin to call a function of `remote_calls` on one engine; returns ipyparallel's result.

        Raises:
            EngineError: The engine is lost.
        """
        return self._view(rank).apply_async(trampoline.run, name, *arguments)

    def _view(self, rank: int) -> Any:
        client = self._launch.client
        if client is None:
            raise ClusterError("the engines were stopped.")
        try:
            return client[self._ids[rank]]
        except (IndexError, ipyparallel.error.NoEnginesRegistered):
            raise EngineError(f"rank {rank}: the engine's process has ended.", rank=rank) from None

    def start_cell(self, rank: int, source: str) -> Any:
        """Begin to run a cell on one engine; returns ipyparallel's result."""
        return self._view(rank).execute(source, silent=False, block=False)

    def call(
        self, ranks: Iterable[int], name: str, arguments: Any = (), *,
        timeout_s: float | None = None,
    ) -> dict[int, Any]:  # fmt: skip
        """Call a function of `remote_calls` on engines and wait; `arguments` are a tuple for all, or one a rank.

        Raises:
            ClusterError: An engine did not answer in time, or cannot be reached.
            EngineError: The function failed on one.
        """
        of = arguments.__getitem__ if isinstance(arguments, dict) else lambda rank: arguments
        calls = {rank: self.start_call(rank, name, *of(rank)) for rank in ranks}
        return answers_of(calls, self.check_alive, timeout_s)

    def interrupt(self, ranks: Iterable[int]) -> None:
        """Interrupt what ranks are doing, as Ctrl-C would. On this host it has been delivered when this returns."""
        self._signal(signal.SIGINT, ranks)

    def _signal(self, number: signal.Signals, ranks: Iterable[int]) -> list[int]:
        """Send a signal to those of the ranks that live; returns the ids of their engines."""
        (ids, records), alive = self._seats, set(self._launch.ids)
        targets = {rank: ids[rank] for rank in ranks if self._lives(records[rank], ids[rank], alive)}
        for rank, engine_id in targets.items():
            with contextlib.suppress(psutil.NoSuchProcess, IndexError):  # it has just ended
                if records[rank].host_id == self.host_id:
                    psutil.Process(records[rank].pid).send_signal(number)
                else:
                    self._launch.client.send_signal(number, targets=[engine_id], block=False)
        return list(targets.values())

    def suspect(self, unanswered: dict[int, Any]) -> None:
        """A cell failed, so its collectives may be half done: the next training forms a new world.

        Other cells go on in the present one, in which the user may have groups and wrapped models.

        Args:
            unanswered: Calls by rank that an interrupt did not end.
        """
        self.suspected = True
        self._unanswered = unanswered

    @property
    def stuck(self) -> list[int]:
        """Ranks that still run a cell which was interrupted long ago."""
        return [rank for rank, call in self._unanswered.items() if not call.ready()]

    def end(self) -> None:
        """End the processes, whatever they are doing. Twice is fine; a forked child of their owner ends nothing."""
        if self.owner != os.getpid():
            return
        self.ended = True
        self.release()
        self._store = None  # an old Run may keep us, but must not keep a socket open
        with self._changing:  # a spare that is just being started is ended too
            self._launch.end()

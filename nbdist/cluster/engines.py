"""The engines: processes with ranks, that have met in a world."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import ipyparallel.error

from nbdist.cluster import entry, fork_server
from nbdist.cluster.launch import Launch
from nbdist.errors import ClusterError, EngineError

__all__ = ["Engine", "Engines"]

_ASK_AGAIN_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What is known of one engine.

    Args:
        rank: Its position in the world.
        pid: The process that trains.
        host: Its host's name.
        host_id: Names its running system; engines that share it share memory.
        device: What it computes on, such as "cpu" or "cuda:0".
        cores: CPU cores it may use, shared with the other engines of its host.
        state: "idle", "busy" or "lost".
    """

    rank: int
    pid: int
    host: str
    host_id: str
    device: str
    cores: int
    state: str = "idle"


class Engines:
    """Engine processes with ranks 0 ... size - 1. They are ready when all of them have met in a collective.

    Args:
        size: How many.
        device: "auto", "cpu" or "cuda".
        timeout_s: How long the start, and later a replacement, may take, in seconds.
        tell: Called with what is being done, a few words, while the start goes on.

    Raises:
        ClusterError: They were not ready in time. Nothing is left running then.
    """

    def __init__(self, size: int, device: str, timeout_s: float, tell: Callable[[str], None]) -> None:
        started_s = time.monotonic()
        self.size = size
        self.timeout_s = timeout_s
        self._device = device
        self.transport = ""
        self.home = ""  # where the last weights came home from
        self.formed = False
        self.suspected = False
        self.ended = False
        self._unanswered: dict[int, Any] = {}
        self._generation = 0
        self._records: list[Engine] = []
        self._store: Any = None
        tell("loading torch" if fork_server.current_server() is None else "starting engines")
        loading = threading.Thread(target=_load_torch, daemon=True)
        loading.start()  # here too, while the engines start
        self._launch = Launch(size)
        try:
            self._launch.wait_for(size, timeout_s, tell)
            loading.join()
            from nbdist.core import handover, world

            self._host_id = handover.host_id()
            self._store = world.host_store()
            self._records = self._introduce(range(size))
            tell("forming the world")
            self.form()
        except BaseException:
            self.end()
            raise
        self.start_seconds = time.monotonic() - started_s

    def records(self, busy: bool = False) -> list[Engine]:
        """One record an engine, in rank order; `busy` is the state of those that live."""
        alive = set(self._launch.client.ids)
        states = [("busy" if busy else "idle") if record.rank in alive else "lost" for record in self._records]
        return [replace(record, state=state) for record, state in zip(self._records, states, strict=True)]

    @property
    def lost(self) -> list[int]:
        """Ranks whose process has ended."""
        return [record.rank for record in self.records() if record.state == "lost"]

    @property
    def threads(self) -> int:
        """CPU threads of a rank by default: its host's cores over the ranks there."""
        hosts = [record.host_id for record in self._records]
        return min(max(1, record.cores // hosts.count(record.host_id)) for record in self._records)

    @property
    def remote(self) -> bool:
        """Whether some engine lives on another host, where our shared memory does not reach."""
        return any(record.host_id != self._host_id for record in self._records)

    def request_stop(self, run_id: str) -> None:
        """Tell the ranks of the present world that a run is to stop: rank 0 asks their store for it."""
        import torch.distributed as dist

        store = self._store
        if store is not None:
            dist.PrefixStore(f"nbdist/{self._generation}", store).set(f"stop/{run_id}", "1")

    def form(self) -> None:
        """Let all engines meet in a world of a new generation."""
        self._generation += 1
        hosts = [record.host_id for record in self._records]
        arguments = {
            record.rank: (
                self._store.host,
                self._store.port,
                self._generation,
                record.rank,
                self.size,
                hosts[: record.rank].count(record.host_id),
                hosts.count(record.host_id),
                self._device,
                self.threads,
            )
            for record in self._records
        }
        formed = self.call(arguments, entry.join, arguments, timeout_s=self.timeout_s)
        self._records = [replace(record, device=formed[record.rank]["device"]) for record in self._records]
        self.transport = formed[0]["transport"]
        self.formed, self.suspected = True, False
        if formed[0]["shares_gpu"]:
            from nbdist.core.world import SHARED_GPU

            warnings.warn(SHARED_GPU, stacklevel=2)

    def replace_lost(self, tell: Callable[[str], None]) -> list[int]:
        """Start new engines for ranks that were lost, and let all meet again. Returns those ranks."""
        lost = self.lost
        for rank in lost:
            self._launch.add(rank)
        if lost:
            self._launch.wait_for(self.size, self.timeout_s, tell)
            fresh = {record.rank: record for record in self._introduce(lost)}
            self._records = [fresh.get(record.rank, record) for record in self._records]
            self.form()
        return lost

    def start_call(self, rank: int, function: Callable[..., Any], *arguments: Any) -> Any:
        """Begin to call a function on one engine; returns ipyparallel's result."""
        return self._launch.client[rank].apply_async(function, *arguments)

    def start_cell(self, rank: int, source: str) -> Any:
        """Begin to run a cell on one engine; returns ipyparallel's result."""
        return self._launch.client[rank].execute(source, silent=False, block=False)

    def call(
        self,
        ranks: Iterable[int],
        function: Callable[..., Any],
        arguments: Any = (),
        *,
        timeout_s: float | None = None,
    ) -> dict[int, Any]:
        """Call a function on engines at once and wait; `arguments` are a tuple for all, or one a rank.

        Raises:
            ClusterError: An engine did not answer in time.
            EngineError: The function failed on one.
        """
        calls = {
            rank: self.start_call(rank, function, *(arguments[rank] if isinstance(arguments, dict) else arguments))
            for rank in ranks
        }
        results = {}
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        for rank, call in calls.items():
            try:
                results[rank] = call.get(timeout=None if deadline is None else max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                raise ClusterError(f"rank {rank} did not answer within {timeout_s:g} s: %dist_stop ends it.") from None
            except ipyparallel.error.RemoteError as error:
                raise EngineError(f"rank {rank}: {error.ename}: {error.evalue}", str(error.traceback), rank) from None
        return results

    def interrupt(self, ranks: Iterable[int]) -> None:
        """Interrupt what ranks are doing, as Ctrl-C would."""
        alive = set(self._launch.client.ids)
        targets = [rank for rank in ranks if rank in alive]
        if targets:
            self._launch.client.send_signal(signal.SIGINT, targets=targets, block=False)

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
        """End the processes, whatever they are doing. Twice is fine."""
        self.ended = True
        self._store = None  # an old Run may keep us, but must not keep a socket open
        self._launch.end()

    def _introduce(self, ranks: Iterable[int]) -> list[Engine]:
        """Let engines load torch and say where they live. Ranks are engine ids."""
        self._greet(ranks)
        facts = self.call(ranks, entry.hello, timeout_s=self.timeout_s)
        return [Engine(rank=rank, device="", **fact) for rank, fact in facts.items()]

    def _greet(self, ranks: Iterable[int]) -> None:
        """Have a word from each engine, asking again where none comes.

        Once in several hundred starts an engine never answered its first call. It counts as registered from its first
        heartbeat, so probably that call reached the controller before the engine's own connection did and was dropped.

        Raises:
            ClusterError: An engine does not answer at all.
        """
        deadline = time.monotonic() + self.timeout_s
        for rank in ranks:
            call = self.start_call(rank, entry.hear)
            while not call.wait(_ASK_AGAIN_S):
                if time.monotonic() > deadline:
                    raise ClusterError(f"rank {rank} did not answer within {self.timeout_s:g} s of its start.")
                call = self.start_call(rank, entry.hear)


def _load_torch() -> None:
    with contextlib.suppress(Exception):  # who needs it next will meet the error again, and can be told
        importlib.import_module("nbdist.core.world")

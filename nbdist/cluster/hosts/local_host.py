"""This process's own host: engines are forked, signalled and watched here. An agent has one too, on its host.

Standard library and psutil only, so that an agent starts quickly.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib.metadata
import itertools
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from traceback import FrameSummary

import psutil

from nbdist.cluster.hosts import fork_client
from nbdist.cluster.hosts.held_memory import HeldMemory
from nbdist.cluster.hosts.host import EngineEnvironment, Host, HostFacts
from nbdist.cluster.hosts.host_socket import HostSocket
from nbdist.engine import stack_dump
from nbdist.engine.parent_watch import FOLDER_VARIABLE, OWNER_VARIABLE, RECORDS
from nbdist.errors import ClusterError
from nbdist.process_mark import alive, process_mark
from nbdist.telemetry.host import INTERFACE_VARIABLE, NAME_VARIABLE, own_address_to
from nbdist.telemetry.record import record_path

__all__ = ["GUARD", "LocalHost", "interface_to", "kill_tree", "versions"]

GUARD = [sys.executable, "-m", "nbdist.engine.parent_watch"]
"""The program that runs a controller or an engine, and ends it with its owner."""
_LOG_TAIL = 800
_RECORD_BYTES = 1 << 20
_PACKAGES = ("torch", "ipyparallel", "nbdist")


class LocalHost(Host):
    """See `Host`.

    Args:
        facts: Of this host.
        folder: Of the cluster on this host; engines write their logs there.
        owner: The mark of the process that the engines end with.
    """

    here = True

    def __init__(self, facts: HostFacts, folder: Path, owner: str) -> None:
        self.name = facts.name
        self._facts = facts
        self._folder = folder
        self._owner = owner
        self._lock = threading.Lock()
        self._marks = set[str]()
        self._spawned: list[subprocess.Popen[bytes]] = []
        self._numbers = itertools.count()
        self._memory = HeldMemory()
        self._sockets: dict[str, HostSocket] = {}

    @property
    def facts(self) -> HostFacts:
        """See `Host`."""
        return self._facts

    @property
    def lost(self) -> bool:
        """See `Host`; never."""
        return False

    def adopt(self, marks: Iterable[str]) -> None:
        """Count engines as started here that an earlier process has started."""
        self._marks.update(marks)

    def start_engines(self, count: int, environment: EngineEnvironment) -> concurrent.futures.Future[list[str]]:
        """See `Host`. The first engine waits until the fork server has loaded torch."""
        marks = []
        for _ in range(count):
            pid = self.start("engine", {**os.environ, **environment})
            with contextlib.suppress(psutil.NoSuchProcess):  # it has ended already
                marks.append(process_mark(pid))
                with self._lock:
                    self._marks.add(marks[-1])
        started: concurrent.futures.Future[list[str]] = concurrent.futures.Future()
        started.set_result(marks)
        return started

    def start(self, kind: str, environment: dict[str, str], arguments: Iterable[str] = ()) -> int:
        """Start a process of ipyparallel; returns its pid.

        It is a fork of the fork server, or a new Python where there is none that can fork.

        Args:
            kind: "controller" or "engine".
            environment: All its variables; owner and folder are added.
            arguments: Of ipyparallel's program.
        """
        profile = self._folder / "profile"
        (profile / "log").mkdir(exist_ok=True, parents=True)
        log = str(profile / "log" / f"{kind}-{os.getpid()}-{next(self._numbers)}.log")
        own = {OWNER_VARIABLE: self._owner, FOLDER_VARIABLE: str(self._folder)}
        environment = {**environment, **own, "IPP_PROFILE_DIR": str(profile)}
        if self.facts.interface:
            environment |= {INTERFACE_VARIABLE: self.facts.interface, NAME_VARIABLE: self.name}
        pid = fork_client.try_fork(kind, arguments, environment, os.getcwd(), log)
        if pid is not None:
            return pid
        with open(log, "ab") as output:
            process = subprocess.Popen(
                [*GUARD, kind, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        with self._lock:
            self._spawned.append(process)
        return process.pid

    def processes(self) -> set[str]:
        """See `Host`."""
        with self._lock:
            self._spawned = [process for process in self._spawned if process.poll() is None]  # no zombies
            self._marks = {mark for mark in self._marks if alive(mark)}
            return set(self._marks)

    def runs(self, mark: str) -> bool:
        """See `Host`."""
        return alive(mark)

    def send_signal(self, mark: str, number: int) -> None:
        """See `Host`."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if alive(mark):
                psutil.Process(int(mark.partition(":")[0])).send_signal(number)

    def stack(self, mark: str, path: str) -> tuple[list[FrameSummary] | None, bool]:
        """See `Host`."""
        pid = int(mark.partition(":")[0])
        return stack_dump.request(pid, path), stack_dump.is_stopped(pid)

    def memory(self, mark: str) -> int:
        """See `Host`."""
        with contextlib.suppress(psutil.NoSuchProcess):
            if alive(mark):
                return int(psutil.Process(int(mark.partition(":")[0])).memory_info().rss)
        return 0

    def hold(self, count: int) -> list[str]:
        """See `Host`."""
        return self._memory.hold(count)

    def begin_read(self, places: Sequence[tuple[str, int, int]]) -> concurrent.futures.Future[list[bytes]]:
        """See `Host`; done on return."""
        read: concurrent.futures.Future[list[bytes]] = concurrent.futures.Future()
        try:
            read.set_result([self._memory.read(*place) for place in places])
        except ClusterError as error:
            read.set_exception(error)
        return read

    def write_memory(self, path: str, start: int, content: bytes | memoryview) -> None:
        """See `Host`."""
        self._memory.write(path, start, content)

    def empty(self, paths: Sequence[str]) -> None:
        """See `Host`."""
        self._memory.empty(paths)

    def release(self, paths: Sequence[str]) -> None:
        """See `Host`."""
        self._memory.release(paths)

    def read_records(self, run_id: str, starts: Sequence[tuple[int, int]]) -> concurrent.futures.Future[list[bytes]]:
        """See `Host`."""
        found: concurrent.futures.Future[list[bytes]] = concurrent.futures.Future()
        found.set_result([self._record(run_id, rank, start) for rank, start in starts])
        return found

    def _record(self, run_id: str, rank: int, start: int) -> bytes:
        try:
            with record_path(run_id, rank, self._folder / RECORDS).open("rb") as file:
                file.seek(start)
                return file.read(_RECORD_BYTES)
        except FileNotFoundError:
            return b""

    def open_socket(self) -> str:
        """See `Host`."""
        opened = HostSocket(self._folder)
        self._sockets[opened.path] = opened
        return opened.path

    def receive(self, path: str, within_s: float) -> bytes | None:
        """See `Host`."""
        return self._sockets[path].receive(within_s)

    def send(self, path: str, data: bytes) -> None:
        """See `Host`."""
        self._sockets[path].send(data)

    def close_socket(self, path: str) -> None:
        """See `Host`."""
        if (opened := self._sockets.pop(path, None)) is not None:
            opened.close()

    def log_tail(self) -> str:
        """See `Host`."""
        logs = sorted((self._folder / "profile" / "log").glob("engine*"))
        return "\n".join(log.read_text(errors="replace")[-_LOG_TAIL:] for log in logs)

    def begin_end(self) -> None:
        """See `Host`. What they run is not waited for."""
        for mark in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                kill_tree(psutil.Process(int(mark.partition(":")[0])))

    def end(self) -> None:
        """See `Host`; the folder is removed too."""
        self.begin_end()
        for server in fork_client.servers_of(str(self._folder)):
            with contextlib.suppress(ClusterError):
                server.end_cluster(str(self._folder))  # it may have forked an engine whose reply was interrupted
        for process in self._spawned:
            process.wait()
        self._memory.release()
        shutil.rmtree(self._folder, ignore_errors=True)


def kill_tree(parent: psutil.Process) -> None:
    """Kill a process and all its children, which by themselves would end later: nannies, data workers."""
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def versions() -> dict[str, str]:
    """The versions here that must be the same on all hosts, by name."""
    found = {"Python": ".".join(platform.python_version_tuple()[:2])}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def interface_to(address: str) -> tuple[str, str]:
    """The network interface that leads to an address, and this host's own address there."""
    own = own_address_to(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(each.address == own for each in addresses):
            return name, own
    return "", own

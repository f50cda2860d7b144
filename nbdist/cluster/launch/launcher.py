"""Launchers: start and end the processes of a cluster, with ipyparallel's launchers and settings."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipyparallel
import psutil
from ipyparallel.cluster import launcher
from traitlets.config import Config

from nbdist.cluster.launch import fork_client
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.engine.parent_watch import FOLDER_VARIABLE, OWNER_VARIABLE, owner_mark
from nbdist.errors import ClusterError

__all__ = ["CONTROLLER_ENDED", "STORE_ENDED", "Launch"]

_ANEW = "so the engines cannot be reached: %dist_start starts new ones; the memory of the old ones is lost."
CONTROLLER_ENDED = f"the controller's process has ended, {_ANEW}"
STORE_ENDED = f"the process of the ranks' store has ended, {_ANEW}"

_GUARD = [sys.executable, "-m", "nbdist.engine.parent_watch"]
_PING_MS = 100  # a registration completes at the next heartbeat: with the default, after up to 3 s
_MISSED_BEATS = 100  # a swapped-out engine misses more than the default of 10 such short beats
_POLL_S = 0.01
_MISSED_AFTER_S = 1.0


class Launch:
    """A controller and its engines as processes, with a client connected to them.

    Args:
        engines: How many engines to start; see `wait_for`.
        patience_s: How long they live without a kernel, in seconds; None if they end with this one.
    """

    def __init__(self, engines: int, patience_s: float | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nbdist-"))
        self.host_id = ""  # set by `Engines`, whose module has loaded torch
        self.client: Any = None
        self.anchor = None if patience_s is None else Anchor.start(str(self.folder), patience_s)
        self._servers: list[fork_client.ForkServer] = []
        if fork_client.can_fork():
            self._servers.append(fork_client.require_server())
        self._cluster = ipyparallel.Cluster(
            n=engines,
            **(_launchers(self._servers) if self._servers else {}),
            delay=0,
            log_level=40,
            cluster_id="",
            cluster_file="",  # other ipyparallel clients must not find this cluster
            profile_dir=str(self.folder / "profile"),
            config=self._settings(),
            load_profile=False,
            shutdown_atexit=False,  # `Cluster` in cluster.py does it, in the right order
            send_engines_connection_env=True,
            controller_args=[
                f"--ping={_PING_MS}", "--usethreads", f"--HeartMonitor.max_heartmonitor_misses={_MISSED_BEATS}",
            ],
        )  # fmt: skip
        try:
            self._cluster.start_cluster_sync(engines)
            self.client = self._cluster.connect_client_sync()
            self._note()
        except BaseException:
            self.end()
            raise

    @classmethod
    def attach(cls, anchor: Anchor, launched: dict[str, Any]) -> Launch:
        """Attach to the processes that another kernel started.

        Args:
            anchor: Their owner.
            launched: That kernel's `ipyparallel.Cluster`, as a dict.
        """
        launch = cls.__new__(cls)
        launch.folder, launch.host_id, launch.anchor = Path(anchor.folder), "", anchor
        launch._servers = [fork_client.require_server()] if fork_client.can_fork() else []
        launchers = _launchers(launch._servers) if launch._servers else {}
        for part, launcher_class in launchers.items():
            launched[part]["class"] = launcher_class  # ipyparallel saved the name of a dynamic class
        launch._cluster = ipyparallel.Cluster.from_dict(
            launched, config=launch._settings(), load_profile=False, shutdown_atexit=False, log_level=50
        )
        launch.client = launch._cluster.connect_client_sync()
        return launch

    def _note(self) -> None:
        """Save the processes at the anchor, for the next kernel."""
        if self.anchor is not None:
            controller = getattr(self._cluster.controller, "process", None)
            marks = []
            for process in [*([controller] if controller else []), *self._engine_processes()]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    marks.append(owner_mark(process.pid))
            self.anchor.note("processes", marks)
            self.anchor.note("launched", self._cluster.to_dict())

    def _settings(self) -> Config:
        owner = owner_mark(os.getpid()) if self.anchor is None else self.anchor.mark
        environment = {OWNER_VARIABLE: owner, FOLDER_VARIABLE: str(self.folder)}
        config = Config()
        config.BaseLauncher.output_limit = 0  # else a stop prints a hundred lines of log per engine
        config.BaseLauncher.environment = environment
        config.LocalEngineSetLauncher.delay = 0
        config.LocalProcessLauncher.stop_seconds_until_kill = 1
        config.ControllerLauncher.controller_cmd = [*_GUARD, "controller"]
        config.EngineLauncher.engine_cmd = [*_GUARD, "engine"]
        return config

    def wait_for(self, engines: int, timeout_s: float, report: Callable[[str], None]) -> None:
        """Wait until `engines` are registered; reports how many are.

        Raises:
            ClusterError: An engine that was just started has ended, or the timeout passed.
        """
        deadline = time.monotonic() + timeout_s
        connect_again_s = time.monotonic() + _MISSED_AFTER_S
        while (ready := len(self.client.ids)) < engines:
            report(f"{ready} of {engines} engines are ready")
            if not self.controller_runs:
                raise ClusterError(CONTROLLER_ENDED)
            if not self._processes_alive():
                raise ClusterError(f"an engine ended while it started:\n{self.log_tail()}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"only {ready} of {engines} engines were ready after {timeout_s:g} s: "
                    f"raise --timeout, or start fewer."
                )
            if time.monotonic() > connect_again_s:
                self._connect_again()
                connect_again_s = time.monotonic() + _MISSED_AFTER_S
            time.sleep(_POLL_S)

    def _connect_again(self) -> None:
        """Replace the client if a new one knows more engines.

        A client receives the list of engines, and then subscribes to changes: it never learns of an engine that
        registers in between.
        """
        with contextlib.suppress(TimeoutError):  # of the controller, which the next round checks
            client = self._cluster.connect_client_sync()
            if len(client.ids) > len(self.client.ids):
                client, self.client = self.client, client
            client.close()

    @property
    def ids(self) -> list[int]:
        """Ids of the engines that the client knows as registered; none after `end`."""
        client = self.client
        return [] if client is None else client.ids

    def pids(self) -> set[int]:
        """Pids of the running engine processes of this host, registered or not."""
        return {process.pid for process in self._engine_processes() if _runs(process)}

    def add(self, count: int) -> None:
        """Start `count` more engines; returns at once. They register later, under new ids."""
        self._cluster.start_engines_sync(count)
        self._note()

    @property
    def controller_runs(self) -> bool:
        """Whether the controller's process runs; True if its launcher is not local."""
        process = getattr(self._cluster.controller, "process", None)
        return process is None or _runs(process)

    def _engine_processes(self) -> list[psutil.Process]:
        return [process for engine_set in list(self._cluster.engines.values()) for process in _processes(engine_set)]

    def end(self) -> None:
        """End every process. Twice is fine.

        Engines of this host are killed at once, without waiting for what they run.
        """
        controller = getattr(self._cluster.controller, "process", None)
        for parent in [*self._engine_processes(), *([controller] if controller else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Its nanny and data workers too: by themselves they would end later.
                for process in [parent, *parent.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
        if self.client is not None:
            self.client.close()
            self.client = None
        if self.folder.exists():
            # Orphans of a killed fork server may stay zombies, for which ipyparallel would wait a minute.
            if all(server.alive for server in self._servers):
                with contextlib.suppress(Exception):  # the processes have ended, whatever ipyparallel raises
                    self._cluster.stop_cluster_sync()
            for server in self._servers:
                with contextlib.suppress(ClusterError):
                    server.end_cluster(str(self.folder))  # it may have forked an engine whose reply was interrupted
            if self.anchor is not None:
                self.anchor.end()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _processes_alive(self) -> bool:
        """Whether the engines started last still run; True if their launcher is not local."""
        newest = list(self._cluster.engines.values())[-1:]
        processes = [process for engine_set in newest for process in _processes(engine_set)]
        return all(map(_runs, processes))

    def log_tail(self) -> str:
        """The end of each engine's log."""
        logs = sorted((self.folder / "profile" / "log").glob("ipengine*"))
        return "\n".join(log.read_text(errors="replace")[-800:] for log in logs)


def _processes(engine_set: Any) -> list[psutil.Process]:
    """The engine processes that a launcher started on this host; empty if it is not a local one."""
    launchers = list(getattr(engine_set, "launchers", {}).values())
    return [process for launcher in launchers if (process := getattr(launcher, "process", None))]


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class _Forked(launcher.LocalProcessLauncher):
    """Starts a process as a fork of the fork server; without one that can fork, as ipyparallel's local launcher does.

    A killed server is replaced by a new one.
    """

    servers: list[fork_client.ForkServer]

    def start(self) -> None:
        server = fork_client.current_server() or fork_client.require_server()
        if server not in self.servers:
            self.servers.append(server)
        if not server.forks:
            super().start()
            return
        request = fork_client.ForkRequest(
            arguments=self.args[len(_GUARD) :], environment={**os.environ, **self.get_env()},
            folder=os.path.abspath(self.work_dir), log=self.output_file, cores=os.sched_getaffinity(0),
        )  # fmt: skip
        try:
            self.pid = server.fork(request)
        except ClusterError as error:
            warnings.warn(f"{error} Processes start one by one instead, which takes longer.", stacklevel=1)
            super().start()
            return
        self.process = psutil.Process(self.pid)
        self.notify_start(self.pid)
        self._start_waiting()


class _ForkedController(_Forked, launcher.LocalControllerLauncher):
    async def get_connection_info(self, timeout: float | None = None) -> Any:
        while self.process.is_running() and not all(os.path.exists(file) for file in self.connection_files.values()):
            await asyncio.sleep(_POLL_S)  # ipyparallel polls only ten times a second
        return await super().get_connection_info(timeout)


class _ForkedEngine(_Forked, launcher.LocalEngineLauncher):
    pass


def _launchers(servers: list[fork_client.ForkServer]) -> dict[str, type]:
    """Launcher classes of ipyparallel that use the fork server; they append each server used to `servers`."""
    bound = {"servers": servers}
    engine = type("ForkedEngine", (_ForkedEngine,), bound)
    engines = type("ForkedEngines", (launcher.LocalEngineSetLauncher,), {"launcher_class": engine})
    return {"controller": type("ForkedController", (_ForkedController,), bound), "engines": engines}

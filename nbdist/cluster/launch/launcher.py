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

from nbdist.cluster.calls.engine_client import EngineClient
from nbdist.cluster.launch import fork_client
from nbdist.cluster.launch.anchor_client import Anchor
from nbdist.cluster.launch.ipyparallel_client import IpyparallelClient
from nbdist.cluster.launch.ipyparallel_patches import adopt
from nbdist.engine.parent_watch import FOLDER_VARIABLE, OWNER_VARIABLE
from nbdist.errors import ClusterError
from nbdist.process_mark import has_ended, process_mark

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
        self.anchor = None if patience_s is None else Anchor.start(str(self.folder), patience_s)
        if fork_client.can_fork():
            fork_client.require_server()  # it loads torch from now on
        self._cluster = ipyparallel.Cluster(
            n=engines,
            controller=ForkedController,
            engines=ForkedEngines,
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
        self.client: EngineClient = IpyparallelClient(self._cluster.connect_client_sync)
        try:
            self._cluster.start_cluster_sync(engines)
            self.client.connect()
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
        if fork_client.can_fork():
            fork_client.require_server()  # for engines that are added later
        launch._cluster = ipyparallel.Cluster.from_dict(
            launched, config=launch._settings(), load_profile=False, shutdown_atexit=False, log_level=50
        )
        launch.client = IpyparallelClient(launch._cluster.connect_client_sync)
        launch.client.connect()
        while launch.client.look_again():  # engines may die at this very moment
            pass
        return launch

    def _note(self) -> None:
        """Save the processes at the anchor, for the next kernel."""
        if self.anchor is not None:
            controller = getattr(self._cluster.controller, "process", None)
            marks = []
            for process in [*([controller] if controller else []), *self._engine_processes()]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    marks.append(process_mark(process.pid))
            self.anchor.note("processes", marks)
            self.anchor.note("launched", self._cluster.to_dict())

    def _settings(self) -> Config:
        owner = process_mark(os.getpid()) if self.anchor is None else self.anchor.mark
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
        look_again_s = time.monotonic() + _MISSED_AFTER_S
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
            if time.monotonic() > look_again_s:
                self.client.look_again()
                look_again_s = time.monotonic() + _MISSED_AFTER_S
            time.sleep(_POLL_S)

    def pids(self) -> set[int]:
        """Pids of the running engine processes of this host, registered or not."""
        return {process.pid for process in self._engine_processes() if not has_ended(process)}

    def add(self, count: int) -> None:
        """Start `count` more engines; returns at once. They register later, under new ids."""
        self._cluster.start_engines_sync(count)
        self._note()

    @property
    def controller_runs(self) -> bool:
        """Whether the controller's process runs; True if its launcher is not local."""
        process = getattr(self._cluster.controller, "process", None)
        return process is None or not has_ended(process)

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
        self.client.close()
        if self.folder.exists():
            servers = fork_client.servers_of(str(self.folder))
            # Orphans of a killed fork server may stay zombies, for which ipyparallel would wait a minute.
            if all(server.alive for server in servers):
                with contextlib.suppress(Exception):  # the processes have ended, whatever ipyparallel raises
                    self._cluster.stop_cluster_sync()
            for server in servers:
                with contextlib.suppress(ClusterError):
                    server.end_cluster(str(self.folder))  # it may have forked an engine whose reply was interrupted
            if self.anchor is not None:
                self.anchor.end()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _processes_alive(self) -> bool:
        """Whether the engines started last still run; True if their launcher is not local."""
        newest = list(self._cluster.engines.values())[-1:]
        processes = [process for engine_set in newest for process in _processes(engine_set)]
        return not any(map(has_ended, processes))

    def log_tail(self) -> str:
        """The end of each engine's log."""
        logs = sorted((self.folder / "profile" / "log").glob("ipengine*"))
        return "\n".join(log.read_text(errors="replace")[-800:] for log in logs)


def _processes(engine_set: Any) -> list[psutil.Process]:
    """The engine processes that a launcher started on this host; empty if it is not a local one."""
    launchers = list(getattr(engine_set, "launchers", {}).values())
    return [process for launcher in launchers if (process := getattr(launcher, "process", None))]


class _Forked(launcher.LocalProcessLauncher):
    """Starts a process as a fork of the fork server; without one that can fork, as ipyparallel's local launcher does.

    A killed server is replaced by a new one.
    """

    def start(self) -> None:
        server = (fork_client.current_server() or fork_client.require_server()) if fork_client.can_fork() else None
        if server is None or not server.forks:
            super().start()
            return
        request = fork_client.ForkRequest(
            arguments=self.args[len(_GUARD) :], environment={**os.environ, **self.get_env()},
            folder=os.path.abspath(self.work_dir), log=self.output_file, cores=os.sched_getaffinity(0),
        )  # fmt: skip
        try:
            pid = server.fork(request)
        except ClusterError as error:
            warnings.warn(f"{error} Processes start one by one instead, which takes longer.", stacklevel=1)
            super().start()
            return
        adopt(self, pid)


class ForkedController(_Forked, launcher.LocalControllerLauncher):
    """The controller, as a fork."""

    entrypoint_name = f"{__name__}.ForkedController"  # by which a `Cluster` that is saved as a dict finds this class

    async def get_connection_info(self, timeout: float | None = None) -> Any:
        """The contents of its connection files, once it has written them."""
        while self.process.is_running() and not all(os.path.exists(file) for file in self.connection_files.values()):
            await asyncio.sleep(_POLL_S)  # ipyparallel polls only ten times a second
        return await super().get_connection_info(timeout)


class _ForkedEngine(_Forked, launcher.LocalEngineLauncher):
    pass


class ForkedEngines(launcher.LocalEngineSetLauncher):
    """Engines, as forks."""

    entrypoint_name = f"{__name__}.ForkedEngines"
    launcher_class = _ForkedEngine

"""Starting and ending the processes: ipyparallel's launchers and their settings."""

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

from nbdist.cluster import fork_server
from nbdist.cluster.owner_guard import FOLDER_VARIABLE, OWNER_VARIABLE, owner_mark
from nbdist.errors import ClusterError

__all__ = ["Launch"]

_GUARD = [sys.executable, "-m", "nbdist.cluster.owner_guard"]
_PING_MS = 100  # a registration completes at the next heartbeat, so the default of 3 s would be waited for
_MISSED_BEATS = 100  # with short beats, a swapped-out engine must not be given up after the default of 10
_POLL_S = 0.01


class Launch:
    """A controller and its engines as processes, with a client connected to them.

    Args:
        engines: How many engines to start; see `wait_for`.
    """

    def __init__(self, engines: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="nbdist-"))
        self._server = fork_server.require_server() if fork_server.can_fork() else None
        self._cluster = ipyparallel.Cluster(
            n=engines,
            **({} if self._server is None else _launchers(self._server)),
            delay=0,
            log_level=40,
            cluster_id="",
            profile_dir=str(self.folder / "profile"),
            config=self._settings(),
            load_profile=False,
            shutdown_atexit=False,  # `Cluster` in cluster.py does it, in the right order
            send_engines_connection_env=True,
            controller_args=[
                f"--ping={_PING_MS}", "--usethreads", f"--HeartMonitor.max_heartmonitor_misses={_MISSED_BEATS}",
            ],
        )  # fmt: skip
        self.client: Any = None
        try:
            self._cluster.start_cluster_sync(engines)
            self.client = self._cluster.connect_client_sync()
        except BaseException:
            self.end()
            raise

    def _settings(self) -> Config:
        environment = {OWNER_VARIABLE: owner_mark(os.getpid()), FOLDER_VARIABLE: str(self.folder)}
        config = Config()
        config.BaseLauncher.output_limit = 0  # or a stop prints a hundred lines of log for each engine
        config.BaseLauncher.environment = environment
        config.LocalEngineSetLauncher.delay = 0
        config.LocalProcessLauncher.stop_seconds_until_kill = 1
        config.ControllerLauncher.controller_cmd = [*_GUARD, "controller"]
        config.EngineLauncher.engine_cmd = [*_GUARD, "engine"]
        return config

    def wait_for(self, engines: int, timeout_s: float, tell: Callable[[str], None]) -> None:
        """Wait until `engines` are registered, telling how many are.

        Raises:
            ClusterError: An engine that was just started has ended, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while (ready := len(self.client.ids)) < engines:
            tell(f"{ready} of {engines} engines are ready")
            if not self._processes_alive():
                raise ClusterError(f"an engine ended while it started:\n{self._log_tail()}")
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"only {ready} of {engines} engines were ready after {timeout_s:g} s: "
                    f"raise --timeout, or start fewer."
                )
            time.sleep(_POLL_S)

    def add(self, engine_id: int) -> None:
        """Start one more engine that registers as `engine_id`."""
        self._cluster.start_engines_sync(1, engine_args=[f"--IPEngine.id={engine_id}"])

    def end(self) -> None:
        """End every process. Twice is fine.

        Engines of this host at once: whatever they do, nobody waits for them any more.
        """
        controller = getattr(self._cluster.controller, "process", None)
        engines = [engine for engine_set in self._cluster.engines.values() for engine in _processes(engine_set)]
        for parent in [*engines, *([controller] if controller else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Its nanny and its data workers too: they would notice, but not at once.
                for process in [parent, *parent.children(recursive=True)]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
        if self.client is not None:
            self.client.close()
            self.client = None
        if self.folder.exists():
            # Orphans of a server that was killed may stay zombies, for whose end ipyparallel would wait a minute.
            if self._server is None or self._server.alive:
                self._cluster.stop_cluster_sync()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _processes_alive(self) -> bool:
        """Whether the engines started last still run; only local launchers can tell."""
        newest = list(self._cluster.engines.values())[-1:]
        processes = [process for engine_set in newest for process in _processes(engine_set)]
        return all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)

    def _log_tail(self) -> str:
        logs = sorted((self.folder / "profile" / "log").glob("ipengine*"))
        return "\n".join(log.read_text(errors="replace")[-800:] for log in logs)


def _processes(engine_set: Any) -> list[psutil.Process]:
    """The engine processes that a launcher started on this host; none where it is not a local one."""
    launchers = getattr(engine_set, "launchers", {}).values()
    return [process for launcher in launchers if (process := getattr(launcher, "process", None))]


class _Forked(launcher.LocalProcessLauncher):
    """Starts a process as a fork of `server` while that can fork, and else is ipyparallel's own local launcher."""

    server: fork_server.ForkServer

    def start(self) -> None:
        if not self.server.forks:
            super().start()
            return
        order = fork_server.Order(
            arguments=self.args[len(_GUARD) :], environment={**os.environ, **self.get_env()},
            folder=os.path.abspath(self.work_dir), log=self.output_file, cores=os.sched_getaffinity(0),
        )  # fmt: skip
        try:
            self.pid = self.server.fork(order)
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
            await asyncio.sleep(_POLL_S)  # ipyparallel looks ten times a second
        return await super().get_connection_info(timeout)


class _ForkedEngine(_Forked, launcher.LocalEngineLauncher):
    pass


def _launchers(server: fork_server.ForkServer) -> dict[str, type]:
    """The launchers of a cluster that `server` forks."""
    bound = {"server": server}
    engine = type("ForkedEngine", (_ForkedEngine,), bound)
    engines = type("ForkedEngines", (launcher.LocalEngineSetLauncher,), {"launcher_class": engine})
    return {"controller": type("ForkedController", (_ForkedController,), bound), "engines": engines}

"""One cluster for all tests of this process, since a start takes seconds; and helpers for its processes."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from nbdist.cluster import Cluster, current_cluster, current_server, end_server, last_run
from nbdist.errors import NbdistError

ENGINES = 2
MARK = "NBDIST_TEST_SESSION"  # every process that these tests start inherits it, however it was orphaned since
HUNG_S = 300.0  # the only timeout of the tests: it ends hung ones, and measures nothing
LATE_S = float(os.environ.get("NBDIST_TEST_LATE_S", "0"))  # a delay after each wait of a test: conditions.py
_POLL_S, _LONGEST_POLL_S = 0.01, 0.2


class SharedCluster:
    """Two CPU engines, started at the first use, and replaced or restarted after a test killed or stopped them."""

    def ready(self) -> Cluster:
        """The running cluster of this process, with living, idle engines."""
        cluster = current_cluster()
        if cluster is not None and cluster.size != ENGINES:
            cluster.stop()
            cluster = None
        cluster = cluster or Cluster(ENGINES, device="cpu")
        run = last_run()
        if run is not None and not run.ended:  # a test failed in the middle of a run
            cluster.interrupt()
            with contextlib.suppress(NbdistError):
                run.wait(HUNG_S)
            if not run.ended:
                cluster.stop()
        if cluster._replay is not None:
            cluster._replay.clear()  # without the definitions of other tests
        return cluster.start()

    def stop(self) -> None:
        """End it; the next `ready` starts another one."""
        cluster = current_cluster()
        if cluster is not None:
            cluster.stop()

    def end(self) -> None:
        """End it, and the fork server too."""
        self.stop()
        end_server()

    def owns(self, process: psutil.Process) -> bool:
        """Whether a process belongs to the running cluster, or is the fork server, which stays for the next one."""
        engines, server = _engines(), current_server()
        if server is not None and process.pid == server.pid:
            return True
        if (cluster := current_cluster()) is not None and process.pid == cluster._up._store.server_pid:
            return True
        return bool(engines) and folder_of(process) == folder_of(engines[0])

    def extra_processes(self) -> list[psutil.Process]:
        """Processes that the engines have started beside the nanny that each one has."""
        found = []
        for engine in _engines():
            for child in _children(engine):
                with contextlib.suppress(psutil.Error):  # it has just ended
                    if "nanny" not in " ".join([child.name(), *child.cmdline()]):
                        found.append(child)
        return found


def pids_of(launch: Any) -> set[int]:
    """The processes of a launch's engines."""
    return {int(mark.partition(":")[0]) for _, mark in launch.processes()}


def _engines() -> list[psutil.Process]:
    cluster, found = current_cluster(), []
    for engine in [] if cluster is None else cluster.engines:
        with contextlib.suppress(psutil.Error):  # it has just ended
            if engine.state != "lost":
                found.append(psutil.Process(engine.pid))
    return found


def _children(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def folder_of(process: psutil.Process) -> Path | None:
    """The folder of the cluster that a process belongs to, if any: its stdout, or an ancestor's, is a log there."""
    lineage: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):  # it has just ended
        lineage = [process, *process.parents()] if process.is_running() else []
    for relative in lineage:
        with contextlib.suppress(OSError):
            log = Path(f"/proc/{relative.pid}/fd/1").readlink()
            if log.parts[-3:-1] == ("profile", "log"):
                return log.parents[2]
    return None


def marked() -> list[psutil.Process]:
    """Processes that this test session started, directly or not, and that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get(MARK) == os.environ[MARK]:
                found.append(process)
    return found


def of_cluster(cluster):
    """All processes of a cluster, and its temporary folder."""
    folder = folder_of(psutil.Process(cluster.engines[0].pid))
    return [process for process in marked() if folder_of(process) == folder], folder


def kill_controller(cluster):
    """Kill the controller; its child, a scheduler, has the same name."""
    controllers = [
        process for process in of_cluster(cluster)[0]
        if "controller" in process.cmdline() or process.name().startswith("nbdist-contr")  # a new Python, or a fork
    ]  # fmt: skip
    (controller,) = [process for process in controllers if process.parent() not in controllers]
    controller.kill()
    assert gone([controller])


def gone(processes: list[psutil.Process]) -> bool:
    """Wait until processes have ended; returns whether they have."""
    return not psutil.wait_procs(processes, timeout=HUNG_S)[1]


def until(condition: Callable[[], Any]) -> Any:
    """Wait until the condition returns something true, and return that; fails after `HUNG_S`."""
    began_s = time.monotonic()
    never = threading.Event()
    while not (value := condition()):
        waited_s = time.monotonic() - began_s
        assert waited_s < HUNG_S, f"waited {HUNG_S:g} s in vain"
        never.wait(min(max(_POLL_S, waited_s / 10), _LONGEST_POLL_S))  # looking may cost much
    never.wait(LATE_S)
    return value

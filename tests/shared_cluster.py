"""One cluster for all tests of this process, since a start takes seconds; and what is known of its processes."""

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
HUNG_S = 300.0  # the one deadline of the tests: it ends one that hangs, and says nothing about how fast anything is
LATE_S = float(os.environ.get("NBDIST_TEST_LATE_S", "0"))  # how late each test is for what it waits for: conditions.py
_POLL_S = 0.01


class SharedCluster:
    """Two CPU engines, started when first asked for, healed when a test killed or stopped them."""

    def ready(self) -> Cluster:
        """The running cluster of this process, with engines that live and have nothing to do."""
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
            cluster._replay.clear()  # what other tests defined is no affair of this one
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
        """Whether a process belongs to the running cluster, or is the fork server that is kept for the next one."""
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
    """The temporary folder of the cluster that a process belongs to, if it does: it holds the log of one of its kin."""
    kin_of: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):  # it has just ended
        kin_of = [process, *process.parents()] if process.is_running() else []
    for kin in kin_of:
        with contextlib.suppress(OSError):
            log = Path(f"/proc/{kin.pid}/fd/1").readlink()
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
    """Its child, a scheduler, has the same name."""
    controllers = [process for process in of_cluster(cluster)[0] if "controll" in process.name()]
    (controller,) = [process for process in controllers if process.parent() not in controllers]
    controller.kill()
    assert gone([controller])


def gone(processes: list[psutil.Process]) -> bool:
    """Wait until processes have ended, however long the machine takes for that."""
    return not psutil.wait_procs(processes, timeout=HUNG_S)[1]


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something true, and return it; a test that waits in vain fails."""
    deadline = time.monotonic() + HUNG_S
    never = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {HUNG_S:g} s in vain"
        never.wait(_POLL_S)
    never.wait(LATE_S)
    return value

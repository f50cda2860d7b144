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
_IDLE_WITHIN_S = 10.0


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
                run.wait(_IDLE_WITHIN_S)
            if not run.ended:
                cluster.stop()
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
        children = [child for engine in _engines() for child in engine.children(recursive=True)]
        return [process for process in children if "nanny" not in " ".join([process.name(), *process.cmdline()])]


def _engines() -> list[psutil.Process]:
    cluster = current_cluster()
    return [] if cluster is None else [psutil.Process(e.pid) for e in cluster.engines if e.state != "lost"]


def folder_of(process: psutil.Process) -> Path | None:
    """The temporary folder of the cluster that a process belongs to, if it does: it holds the log of one of its kin."""
    for kin in [process, *process.parents()] if process.is_running() else []:
        with contextlib.suppress(OSError):
            log = Path(f"/proc/{kin.pid}/fd/1").readlink()
            if log.parts[-3:-1] == ("profile", "log"):
                return log.parents[2]
    return None


def marked() -> list[psutil.Process]:
    """Processes that this test session started, directly or not, and that still run."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
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
    psutil.wait_procs([controller], timeout=5)


def until(condition: Callable[[], Any], within_s: float = 10.0) -> Any:
    """Wait for something true, and return it; a test that waits in vain fails."""
    deadline = time.monotonic() + within_s
    never = threading.Event()
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {within_s:g} s in vain"
        never.wait(0.02)
    return value

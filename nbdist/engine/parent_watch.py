"""Parent watchdog: run a controller or an engine that ends when its owner does, however the owner ended.

A host starts it as ``python -m nbdist.engine.parent_watch controller|engine ARGS...``. The owner is a
process of this host, named by `OWNER_VARIABLE`. (Linux's parent-death signal is tied to the thread that forked, so it
would fire when a notebook's worker thread ends.)
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import signal
import sys
import threading
import time
from typing import Any

import psutil

from nbdist.process_mark import alive, process_mark

__all__ = [
    "FOLDER_VARIABLE", "OWNER_VARIABLE", "RECORDS", "in_slurm_job", "main", "outlive_termination", "wait_for_exit",
]  # fmt: skip

OWNER_VARIABLE = "NBDIST_OWNER"
FOLDER_VARIABLE = "NBDIST_FOLDER"
RECORDS = "runs"
"""The folder of records in the cluster's folder, of engines whose host is not the notebook's."""
_LOOK_S = 0.5  # psutil before 7.2 does not wake up when a process becomes a zombie
_GRACE_S = 2.0
_owner_ended, _outlives = threading.Event(), threading.Event()


def wait_for_exit(mark: str, within_s: float = math.inf) -> bool:
    """Wait until the process that `mark` names has ended, but not longer than `within_s`; returns whether it has."""
    deadline = time.monotonic() + within_s
    while alive(mark):
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        with contextlib.suppress(psutil.Error):  # it has ended, or the timeout passed
            psutil.Process(int(mark.partition(":")[0])).wait(min(left_s, _LOOK_S))
    return True


def in_slurm_job() -> bool:
    """Whether this process is part of a job of Slurm, which terminates all before it ends."""
    return "SLURM_JOB_ID" in os.environ


def outlive_termination() -> None:
    """Let an engine of a job outlive SIGTERM until its owner ends, who saves first. Local; main thread only.

    Its children do not: programs end theirs with that signal. Twice is fine.
    """
    if not in_slurm_job() or _outlives.is_set():
        return
    _outlives.set()
    end: Any = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, lambda *about: end(*about) if _owner_ended.is_set() else None)
    os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)


def _watch(mark: str, folder: str | None) -> None:
    wait_for_exit(mark)
    _owner_ended.set()
    if folder is None:  # an engine: time to clean up before SIGKILL
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    if folder:  # the controller removes what the owner no longer can; the engines have ended by now
        shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGKILL)


def _end_with_controller() -> None:
    """End a child that the controller forked (a scheduler) when the controller ends."""
    mark = process_mark(os.getppid())

    def watch() -> None:
        wait_for_exit(mark)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="nbdist-owner-guard").start()


def main() -> None:
    """Start the watchdog thread, then run ipyparallel's controller or engine."""
    kind = sys.argv.pop(1)
    mark = os.environ.get(OWNER_VARIABLE)
    if mark:
        folder = os.environ.get(FOLDER_VARIABLE) if kind == "controller" else None
        threading.Thread(target=_watch, args=(mark, folder), daemon=True, name="nbdist-owner-guard").start()
    # A shell's background job ignores interrupts, and its children inherit that; an engine must not.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if kind == "engine":
        from ipyparallel.engine.app import main as run
    else:
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=_end_with_controller)
        from ipyparallel.controller.app import main as run
    sys.exit(run())


if __name__ == "__main__":
    main()

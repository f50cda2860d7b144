"""Fork server: a process with torch loaded that forks controller, engines and ipyparallel's nannies.

It starts no thread and does not initialize CUDA: neither survives a fork. It ends when its owner closes the pipe or has
ended; in the second case it also kills its remaining forks, as one that hangs cannot end itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import shutil
import signal
import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NoReturn

import psutil

from nbdist.cluster.hosts import ipyparallel_patches
from nbdist.cluster.hosts.fork_client import ForkRequest
from nbdist.engine import parent_watch
from nbdist.process_mark import alive

__all__ = ["main", "serve"]

_POLL_S = 0.5
_GRACE_S = 3.0
"""How long a fork whose owner has ended may take to end by itself."""
_DEAD_WITHIN_S = 1.0
_ENGINE = [
    "torch.distributed", "numpy.random", "nbdist.engine.remote_calls",
    "ipyparallel.datapub", "ipykernel.debugger", "tornado.platform.asyncio", "tornado.locks",
    "IPython.extensions.storemagic",
]  # fmt: skip


class _ChildProcesses:
    """The forked processes, held by pidfd, so that a signal never hits another process that reuses a pid."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, str]] = {}  # pidfd of each process -> its pid, its cluster's folder
        self._owners: dict[str, str] = {}  # the owner of each cluster, by its folder

    def add(self, pid: int, folder: str, owner: str) -> None:
        """Open a pidfd of a child, at once: before its pid can be reused."""
        self._held = {pidfd: other for pidfd, other in self._held.items() if not self._close_ended(pidfd)}
        with contextlib.suppress(OSError):  # it has ended already, or the kernel has no pidfd
            self._held[os.pidfd_open(pid)] = pid, folder
        if folder:
            self.note_owner(folder, owner)

    def note_owner(self, folder: str, owner: str) -> None:
        """The cluster with this folder is to `end` with its owner."""
        self._owners[folder] = owner

    def forget(self) -> None:
        """Close all pidfds; called in a new child, whose siblings they are."""
        for held in self._held:
            os.close(held)
        self._held = {}

    def end(self, folder: str) -> None:
        """Kill the processes of the cluster with this folder, and their children, and remove the folder."""
        killed = [held for held, (_, of) in self._held.items() if of == folder and not _has_ended(held)]
        for held in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self._held[held][0]).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(held, signal.SIGKILL)
        deadline = time.monotonic() + _DEAD_WITHIN_S
        for held in killed:  # one that is just starting would create the folder again
            _has_ended(held, max(0.0, deadline - time.monotonic()))
        shutil.rmtree(folder, ignore_errors=True)
        self._owners.pop(folder, None)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended, or the timeout passes."""
        deadline = time.monotonic() + timeout_s
        for held in self._held:
            _has_ended(held, max(0.0, deadline - time.monotonic()))

    def end_orphans(self) -> None:
        """`end` every cluster whose owner (a kernel or an anchor) has ended."""
        for folder, owner in list(self._owners.items()):
            if not alive(owner):
                self.end(folder)

    @staticmethod
    def _close_ended(pidfd: int) -> bool:
        if not _has_ended(pidfd):
            return False
        os.close(pidfd)
        return True


def _has_ended(pidfd: int, timeout_s: float = 0.0) -> bool:
    """Whether the process of a pidfd has ended, or ends within the timeout."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


def serve(pipe: Connection, owner: str, folder: str = "") -> None:
    """The server's loop: fork on request, until the pipe closes or the owner has ended.

    Args:
        pipe: To the owner.
        owner: Its mark.
        folder: See `ForkServer`.
    """
    children = _ChildProcesses()
    if folder:
        children.note_owner(folder, owner)
    _serve(pipe, owner, children)
    if parent_watch.wait_for_exit(owner, _POLL_S):  # else the owner ends this server and its forks itself
        children.wait(_GRACE_S)
        children.end_orphans()


def _serve(pipe: Connection, owner: str, children: _ChildProcesses) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if parent_watch.in_slurm_job():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # its owner says when this ends
    _load(ipyparallel_patches.CONTROL_PLANE)
    while True:
        try:
            while not pipe.poll(_POLL_S):
                if not alive(owner):
                    return
            number, request = pipe.recv()
        except (EOFError, OSError):
            return
        if isinstance(request, str):
            children.end(request)
            with contextlib.suppress(OSError):
                pipe.send((number, 0, ""))
            continue
        pid, error = 0, _load(_ENGINE) if request.arguments[0] == "engine" else ""
        if not error and threading.active_count() > 1:
            error = "a library has started threads while it was loaded"
        if not error:
            pid = os.fork()
            if pid == 0:
                pipe.close()
                children.forget()
                _become(request)
            variables = request.environment
            folder = variables.get(parent_watch.FOLDER_VARIABLE, "")
            children.add(pid, folder, variables.get(parent_watch.OWNER_VARIABLE, owner))
        try:
            pipe.send((number, pid, error))
        except OSError:  # the owner has ended meanwhile
            return
        if request.loads:
            _load(_ENGINE)  # in the first start, while the controller gets ready


def _load(modules: list[str]) -> str:
    """Import modules; returns the error's text, or ""."""
    if all(module in sys.modules for module in modules):
        return ""
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    gc.collect()
    gc.freeze()  # else a collection in a child would write to, and so copy, all pages
    if "torch" in sys.modules:
        from nbdist.core.process.memory import note_frozen

        note_frozen()
    return ""


def _become(request: ForkRequest) -> NoReturn:
    """Turn this fork into the requested process; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        with open(request.log, "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(request.environment)
        time.tzset()
        os.chdir(request.folder)
        os.sched_setaffinity(0, request.cores)
        kind = request.arguments[0]
        Path("/proc/self/comm").write_text(f"nbdist-{kind}")
        if kind == "controller":
            ipyparallel_patches.skip_controller_sleep()
        if kind == "engine":
            sys.modules["numpy"].random.seed()  # the forked state is the same in all engines
            ipyparallel_patches.fork_nanny()
        # ipyparallel's default was set to the server's folder at import.
        sys.argv = ["nbdist", *request.arguments, f"--work-dir={request.folder}"]
        parent_watch.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)  # skip the server's exit handlers


def main() -> None:
    """Entry point of the process that `ForkServer` starts."""
    serve(Connection(int(sys.argv[1])), *sys.argv[2:4])

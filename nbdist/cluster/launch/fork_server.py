"""What the fork server runs, and what its forks become: controller, engines and their nannies.

The server starts no thread and touches no GPU, for neither survives a fork. It ends when its owner closes the pipe, or
is gone: then it also ends what is left of its forks, for one that hangs cannot end itself.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import select
import shutil
import signal
import sys
import threading
import time
import types
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

import psutil

from nbdist.cluster.launch.fork_client import ForkRequest
from nbdist.engine import parent_watch

__all__ = ["main", "serve"]

_POLL_S = 0.5
_GRACE_S = 3.0
"""How long a fork whose owner is gone has to end by itself."""
_DEAD_WITHIN_S = 1.0
_CONTROL_PLANE = ["ipyparallel.controller.app", "ipyparallel.engine.app", "ipyparallel.engine.nanny"]
_ENGINE = [
    "torch.distributed", "numpy.random", "nbdist.engine.remote_calls",
    "ipyparallel.datapub", "ipykernel.debugger", "tornado.platform.asyncio", "tornado.locks",
    "IPython.extensions.storemagic",
]  # fmt: skip


class _ChildProcesses:
    """The processes that were forked, held so that a number which is another one's by now is never hit."""

    def __init__(self) -> None:
        self._held: dict[int, tuple[int, str]] = {}  # a descriptor of each process; its number, its cluster's folder
        self._owners: dict[str, str] = {}  # of each cluster, by its folder

    def add(self, pid: int, folder: str, owner: str) -> None:
        """Hold a child, at once: its number is not given to another process so soon."""
        self._held = {held: other for held, other in self._held.items() if not self._ended(held)}
        with contextlib.suppress(OSError):  # it has ended at once, or the system is too old
            self._held[os.pidfd_open(pid)] = pid, folder
        if folder:
            self._owners[folder] = owner

    def forget(self) -> None:
        """Let go of all; called in a child, whose brothers they are."""
        for held in self._held:
            os.close(held)
        self._held = {}

    def end(self, folder: str) -> None:
        """Kill who still runs of the cluster with this folder, its own children too, and remove the folder."""
        killed = [held for held, (_, of) in self._held.items() if of == folder and not _over(held)]
        for held in killed:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(self._held[held][0]).children(recursive=True):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(held, signal.SIGKILL)
        deadline = time.monotonic() + _DEAD_WITHIN_S
        for held in killed:  # one that is just starting would make the folder anew
            _over(held, max(0.0, deadline - time.monotonic()))
        shutil.rmtree(folder, ignore_errors=True)
        self._owners.pop(folder, None)

    def wait(self, timeout_s: float) -> None:
        """Wait until all have ended, but not for longer than a time."""
        deadline = time.monotonic() + timeout_s
        for held in self._held:
            _over(held, max(0.0, deadline - time.monotonic()))

    def end_orphans(self) -> None:
        """`end` every cluster whose owner is gone: a kernel, or an anchor."""
        for folder, owner in list(self._owners.items()):
            if not parent_watch.alive(owner):
                self.end(folder)

    @staticmethod
    def _ended(held: int) -> bool:
        if not _over(held):
            return False
        os.close(held)
        return True


def _over(held: int, timeout_s: float = 0.0) -> bool:
    """Whether the process of a descriptor has ended, or does so within a time."""
    over = select.poll()
    over.register(held, select.POLLIN)
    return bool(over.poll(timeout_s * 1000))


def serve(pipe: Connection, owner: str) -> None:
    """The server's loop: fork what is ordered, until the pipe closes or the owner is gone."""
    brood = _ChildProcesses()
    _serve(pipe, owner, brood)
    if parent_watch.ends(owner, _POLL_S):  # else it ends us in good order, now
        brood.wait(_GRACE_S)
        brood.end_orphans()


def _serve(pipe: Connection, owner: str, brood: _ChildProcesses) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _load(_CONTROL_PLANE)
    while True:
        try:
            while not pipe.poll(_POLL_S):
                if not parent_watch.alive(owner):
                    return
            number, request = pipe.recv()
        except (EOFError, OSError):
            return
        if isinstance(request, str):
            brood.end(request)
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
                brood.forget()
                _become(request)
            told = request.environment
            brood.add(pid, told.get(parent_watch.FOLDER_VARIABLE, ""), told.get(parent_watch.OWNER_VARIABLE, owner))
        try:
            pipe.send((number, pid, error))
        except OSError:  # the owner has gone meanwhile
            return
        _load(_ENGINE)  # while the controller of a first start gets ready


def _load(modules: list[str]) -> str:
    """Import modules; returns what went wrong."""
    if all(module in sys.modules for module in modules):
        return ""
    try:
        for module in modules:
            importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    gc.collect()
    gc.freeze()  # a collection in a child would else write to, and so copy, all pages
    return ""


def _become(request: ForkRequest) -> NoReturn:
    """Turn this fork into what was ordered; never returns."""
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
            _hurry_controller()
        if kind == "engine":
            sys.modules["numpy"].random.seed()  # or all engines would draw the same numbers, as they draw their state
            _prepare_nanny()
        # ipyparallel took the server's folder for the default when it was loaded.
        sys.argv = ["nbdist", *request.arguments, f"--work-dir={request.folder}"]
        parent_watch.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)  # nothing of the server's is to be tidied up here


def _hurry_controller() -> None:
    """Leave out a nap of 250 ms that ipyparallel's controller takes before it says where it listens.

    Its sockets are bound by then, or queue. It is the only nap in that module; without it there, nothing changes.
    """
    from ipyparallel.controller import app

    app.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


def _prepare_nanny() -> None:
    """Fork the engine's nanny now, while there is no thread, and let ipyparallel find it when it wants to start one.

    ipyparallel's own way is a new Python, which takes longer to start than the engine. Without `start_nanny` in
    ipyparallel's module, that way stays.
    """
    from ipyparallel.engine import app, nanny

    if not hasattr(app, "start_nanny"):
        return
    wants, asked = os.pipe()
    answered, answers = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.dup2(wants, 0)
        os.dup2(answers, 1)
        os.closerange(3, max(wants, asked, answered, answers) + 1)
        Path("/proc/self/comm").write_text("nbdist-nanny")
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - the server's own was at its end
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        try:
            nanny.main()
        finally:
            os._exit(0)
    os.close(wants)
    os.close(answers)

    def start_nanny(**arguments: Any) -> tuple[str, Any]:
        with open(asked, "wb") as request:
            pickle.dump({**arguments, "pid": os.getpid()}, request)
        answer = open(answered)  # noqa: SIM115 - the nanny ends when it closes
        url = answer.readline().strip()
        if not url:
            raise RuntimeError("the nanny has ended")
        return url, answer

    app.start_nanny = start_nanny


def main() -> None:
    """Serve, as the process that `ForkServer` starts."""
    serve(Connection(int(sys.argv[1])), sys.argv[2])

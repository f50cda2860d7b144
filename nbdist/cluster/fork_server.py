"""A process with torch loaded, from which engines are forked: they start in milliseconds and share its memory.

`ForkServer` is the notebook's handle; `serve` is what the server itself runs. It starts no thread and touches no GPU:
neither survives a fork. It ends when its owner does, or closes the pipe.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, NoReturn

from nbdist.cluster import owner_guard
from nbdist.errors import ClusterError

__all__ = ["FORK_VARIABLE", "ForkServer", "Order", "can_fork", "current_server", "end_server", "main", "require_server"]

FORK_VARIABLE = "NBDIST_FORK"
"""Set to "off", it keeps the fork server out: every engine is then a process of its own from the start."""

_COMMAND = "from nbdist.cluster.fork_server import main; main()"
_POLL_S = 0.5
_CONTROL_PLANE = ["ipyparallel.controller.app", "ipyparallel.engine.app", "ipyparallel.engine.nanny"]
_ENGINE = [
    "torch.distributed", "numpy.random", "nbdist.cluster.entry", "nbdist.core.train", "nbdist.core.handover",
    "ipyparallel.datapub", "ipykernel.debugger", "tornado.platform.asyncio", "tornado.locks",
    "IPython.extensions.storemagic",
]  # fmt: skip
_READ_WHEN_LOADED = (
    "ATEN_", "GOMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH_",
)  # fmt: skip
"""Variables that Python and torch read once, when they are loaded."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a child of the server is to become.

    Args:
        arguments: Of `owner_guard.main`: "controller" or "engine", then ipyparallel's own.
        environment: All its variables.
        folder: Where it runs.
        log: The file for what it prints.
        cores: Numbers of the CPU cores it may use.
    """

    arguments: Sequence[str]
    environment: dict[str, str]
    folder: str
    log: str
    cores: set[int]


class ForkServer:
    """A running fork server, and the way to ask it for processes. Local to the process that made it."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(theirs.fileno()), owner_guard.owner_mark(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
                env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"},  # or ipykernel's debugger warns
            )  # fmt: skip
        self._pipe = ours
        self._orders = 0
        self._read = _read_when_loaded()
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return not self._pipe.closed and self._process.poll() is None

    @property
    def fits(self) -> bool:
        """Whether it runs, and what was read from the environment when it loaded torch still holds."""
        return self.alive and self._read == _read_when_loaded()

    def fork(self, order: Order) -> int:
        """Let it fork a process; returns the number of that process. The first engine waits for torch.

        Raises:
            ClusterError: The server has ended, or cannot fork.
        """
        self._orders += 1
        try:
            self._pipe.send((self._orders, order))
            while True:
                number, pid, error = self._pipe.recv()
                if number == self._orders:
                    break
                with contextlib.suppress(ProcessLookupError):  # of an order whose wait was interrupted
                    os.kill(pid, signal.SIGKILL)
        except (EOFError, OSError) as ended:
            self.end()
            raise ClusterError("the fork server has ended.") from ended
        if error:
            self.end()
            raise ClusterError(f"the fork server cannot fork: {error}.")
        return int(pid)

    def end(self) -> None:
        """End the server; what it forked goes on. Twice is fine."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()


_server: ForkServer | None = None


def can_fork() -> bool:
    """Whether engines may be forked here: on Linux, unless ``$NBDIST_FORK`` is "off"."""
    return sys.platform == "linux" and os.environ.get(FORK_VARIABLE) != "off"


def current_server() -> ForkServer | None:
    """The fork server of this process, if one runs."""
    return _server if _server is not None and _server.alive else None


def require_server() -> ForkServer:
    """The fork server of this process, started if there is none; returns before it has loaded anything."""
    global _server
    if _server is None or not _server.fits:
        if _server is not None:
            _server.end()
        else:
            atexit.register(end_server)
        _server = ForkServer()
    return _server


def end_server() -> None:
    """End the fork server of this process, if there is one."""
    global _server
    if _server is not None:
        _server.end()
        _server = None


def _read_when_loaded() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_READ_WHEN_LOADED)}


def serve(pipe: Connection, owner: str) -> None:
    """The server's loop: fork what is ordered, until the pipe closes or the owner is gone."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # no zombies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _load(_CONTROL_PLANE)
    while True:
        try:
            while not pipe.poll(_POLL_S):
                if not owner_guard.alive(owner):
                    return
            number, order = pipe.recv()
        except (EOFError, OSError):
            return
        pid, error = 0, _load(_ENGINE) if order.arguments[0] == "engine" else ""
        if not error and threading.active_count() > 1:
            error = "a library has started threads while it was loaded"
        if not error:
            pid = os.fork()
            if pid == 0:
                pipe.close()
                _become(order)
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


def _become(order: Order) -> NoReturn:
    """Turn this fork into what was ordered; never returns."""
    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        with open(order.log, "ab") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        os.environ.clear()
        os.environ.update(order.environment)
        time.tzset()
        os.chdir(order.folder)
        os.sched_setaffinity(0, order.cores)
        kind = order.arguments[0]
        Path("/proc/self/comm").write_text(f"nbdist-{kind}")
        if kind == "engine":
            sys.modules["numpy"].random.seed()  # or all engines would draw the same numbers, as they draw their state
            _prepare_nanny()
        # ipyparallel took the server's folder for the default when it was loaded.
        sys.argv = ["nbdist", *order.arguments, f"--work-dir={order.folder}"]
        owner_guard.main()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)  # nothing of the server's is to be tidied up here


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

"""A process with torch loaded, from which engines are forked: they start in milliseconds and share its memory.

This is the notebook's side; what the server itself runs is in `forks`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Pipe

from nbdist.engine import parent_watch
from nbdist.errors import ClusterError

__all__ = ["FORK_VARIABLE", "ForkRequest", "ForkServer", "can_fork", "current_server", "end_server", "require_server"]

FORK_VARIABLE = "NBDIST_FORK"
"""Set to "off", it keeps the fork server out: every engine is then a process of its own from the start."""

_COMMAND = "from nbdist.cluster.launch.fork_server import main; main()"
_READ_WHEN_LOADED = (
    "ATEN_", "GOMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH_",
)  # fmt: skip
"""Variables that Python and torch read once, when they are loaded."""


@dataclass(frozen=True, kw_only=True)
class ForkRequest:
    """What a child of the server is to become.

    Args:
        arguments: Of `parent_watch.main`: "controller" or "engine", then ipyparallel's own.
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
                [sys.executable, "-c", _COMMAND, str(theirs.fileno()), parent_watch.owner_mark(os.getpid())],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
                env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"},  # or ipykernel's debugger warns
            )  # fmt: skip
        self._pipe = ours
        self._owner = os.getpid()
        self._one_at_a_time = threading.Lock()
        self._orders = 0
        self._broken = False
        self._read = _read_when_loaded()
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, and is ours: to a forked child of who has started it, it is nobody."""
        return self._owner == os.getpid() and not self._pipe.closed and self._process.poll() is None

    @property
    def fits(self) -> bool:
        """Whether it can fork, and what was read from the environment when it loaded torch still holds."""
        return self.forks and self._read == _read_when_loaded()

    @property
    def forks(self) -> bool:
        """Whether it runs and has not failed to fork."""
        return self.alive and not self._broken

    def fork(self, request: ForkRequest) -> int:
        """Let it fork a process; returns the number of that process. The first engine waits for torch.

        Raises:
            ClusterError: The server has ended, or cannot fork.
        """
        pid, error = self._ask(request)
        if error:
            self._broken = True  # it lives on, for what it has forked: nobody else would reap that
            raise ClusterError(f"the fork server cannot fork: {error}.")
        return pid

    def end_cluster(self, folder: str) -> None:
        """Let it end whatever it has forked for the cluster with this folder, also of late, and remove the folder.

        Raises:
            ClusterError: The server has ended.
        """
        self._ask(folder)

    def _ask(self, request: ForkRequest | str) -> tuple[int, str]:
        try:
            with self._one_at_a_time:
                self._orders += 1
                self._pipe.send((self._orders, request))
                while True:
                    number, pid, error = self._pipe.recv()
                    if number == self._orders:
                        return int(pid), str(error)
                    if pid:  # of an order whose wait was interrupted
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
        except (EOFError, OSError) as ended:
            self.end()
            raise ClusterError("the fork server has ended.") from ended

    def end(self) -> None:
        """End the server; what it forked goes on. Twice is fine; a forked child of its owner ends nothing."""
        if self._owner != os.getpid():
            return
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

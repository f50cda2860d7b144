"""Client of the fork server, a process with torch loaded: engines forked from it start in ms and share its memory.

This is the kernel's side; the server is in `fork_server`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Pipe

from nbdist.engine import parent_watch
from nbdist.errors import ClusterError
from nbdist.process_mark import process_mark

__all__ = [
    "FORK_VARIABLE",
    "ForkRequest",
    "ForkServer",
    "can_fork",
    "current_server",
    "end_server",
    "require_server",
    "servers_of",
    "try_fork",
]

FORK_VARIABLE = "NBDIST_FORK"
"""Set to "off", it disables the fork server: every engine is then a new Python process."""

_COMMAND = "from nbdist.cluster.hosts.fork_server import main; main()"
_READ_WHEN_LOADED = (
    "ATEN_", "GOMP_", "LD_", "MALLOC_", "MKL_", "OMP_", "OPENBLAS_", "PYTHON", "PYTORCH_", "TORCH_",
)  # fmt: skip
"""Variables that Python and torch read only once, at load: a change needs a new server."""


@dataclass(frozen=True, kw_only=True)
class ForkRequest:
    """The process that the server is to fork.

    Args:
        arguments: Of `parent_watch.main`: "controller" or "engine", then ipyparallel's own.
        environment: All its environment variables.
        folder: Its working directory.
        log: The file for its output.
        cores: Numbers of the CPU cores it may use.
        loads: Whether the server loads torch afterwards: engines follow.
    """

    arguments: Sequence[str]
    environment: dict[str, str]
    folder: str
    log: str
    cores: set[int]
    loads: bool = True


class ForkServer:
    """A running fork server and the pipe to it. Local to the process that created it.

    Args:
        folder: Of a cluster, removed if this process is killed, forks or not; "" for none.
    """

    def __init__(self, folder: str = "") -> None:
        pipe, server_end = Pipe()
        with server_end:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND, str(server_end.fileno()), process_mark(os.getpid()), folder],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                pass_fds=[server_end.fileno()], start_new_session=True,
                env={**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1"},  # or ipykernel's debugger warns
            )  # fmt: skip
        self._pipe = pipe
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._requests = 0
        self._broken = False
        self._variables = _read_when_loaded()
        self.clusters: set[str] = set()  # folders of the clusters that it has forked for
        self.pid = self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs; False in a forked child of the process that started it."""
        return self._owner == os.getpid() and not self._pipe.closed and self._process.poll() is None

    @property
    def fits(self) -> bool:
        """Whether it can fork, and the variables that Python and torch read at load are unchanged."""
        return self.forks and self._variables == _read_when_loaded()

    @property
    def forks(self) -> bool:
        """Whether it runs and has not failed to fork."""
        return self.alive and not self._broken

    def fork(self, request: ForkRequest) -> int:
        """Fork a process; returns its pid. The first engine waits until the server has loaded torch.

        Raises:
            ClusterError: The server has ended, or cannot fork.
        """
        self.clusters.add(request.environment.get(parent_watch.FOLDER_VARIABLE, ""))
        pid, error = self._call(request)
        if error:
            self._broken = True  # it keeps running: only it reaps its forks
            raise ClusterError(f"the fork server cannot fork: {error}.")
        return pid

    def end_cluster(self, folder: str) -> None:
        """Kill all that it forked for the cluster with this folder, and remove the folder.

        Raises:
            ClusterError: The server has ended.
        """
        self._call(folder)

    def _call(self, request: ForkRequest | str) -> tuple[int, str]:
        try:
            with self._lock:
                self._requests += 1
                self._pipe.send((self._requests, request))
                while True:
                    number, pid, error = self._pipe.recv()
                    if number == self._requests:
                        return int(pid), str(error)
                    if pid:  # of a request whose wait was interrupted
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(pid, signal.SIGKILL)
        except (EOFError, OSError) as ended:
            self.end()
            raise ClusterError("the fork server has ended.") from ended

    def end(self) -> None:
        """End the server, but not its forks. Twice is fine; does nothing in a forked child of its owner."""
        if self._owner != os.getpid():
            return
        self._pipe.close()
        self._process.kill()
        self._process.wait()


_server: ForkServer | None = None
_earlier: list[ForkServer] = []


def can_fork() -> bool:
    """Whether engines may be forked here: on Linux, unless ``$NBDIST_FORK`` is "off"."""
    return sys.platform == "linux" and os.environ.get(FORK_VARIABLE) != "off"


def current_server() -> ForkServer | None:
    """The fork server of this process, if one runs."""
    return _server if _server is not None and _server.alive else None


def require_server(folder: str = "") -> ForkServer:
    """The fork server of this process, started if there is none; does not wait until it has loaded torch.

    Args:
        folder: See `ForkServer`.
    """
    global _server
    if _server is None or not _server.fits:
        if _server is not None:
            _server.end()
            _earlier.append(_server)
        else:
            atexit.register(end_server)
        _server = ForkServer(folder)
    return _server


def try_fork(
    kind: str, arguments: Iterable[str], environment: dict[str, str], folder: str, log: str, *, loads: bool = True
) -> int | None:  # fmt: skip
    """Fork a process of ipyparallel's; returns its pid, None where none can be forked. A killed server is replaced.

    Args:
        kind: "controller" or "engine".
        arguments: Of ipyparallel's program.
        environment: All its variables.
        folder: Its working directory.
        log: The file for its output.
        loads: See `ForkRequest`.
    """
    if not can_fork():
        return None
    server = current_server() or require_server()
    if not server.forks:
        return None
    request = ForkRequest(
        arguments=[kind, *arguments], environment=environment, folder=folder, log=log, cores=os.sched_getaffinity(0),
        loads=loads,
    )  # fmt: skip
    try:
        return server.fork(request)
    except ClusterError as error:
        warnings.warn(f"{error} Processes start one by one instead, which takes longer.", stacklevel=1)
        return None


def servers_of(folder: str) -> list[ForkServer]:
    """The fork servers of this process, ended ones too, that have forked for the cluster with this folder."""
    return [server for server in (*_earlier, *filter(None, [_server])) if folder in server.clusters]


def end_server() -> None:
    """End the fork server of this process, if there is one."""
    global _server
    if _server is not None:
        _server.end()
        _server = None


def _read_when_loaded() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(_READ_WHEN_LOADED)}

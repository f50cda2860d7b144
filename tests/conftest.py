"""Fixtures for all tests: ranks as real processes, a separate ``$NBDIST_HOME`` for every test, and leak checks."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import psutil
import pytest

_GONE_WITHIN_S = 300.0  # ends a hung suite: a loaded machine may take long to end a process
_POLL_S = 0.02
_SHARED_MEMORY = Path("/dev/shm")
# Set by pytest for each test, by torch at its first optimizer, and by scikit-learn at import.
_OTHERS_VARIABLES = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}


def pytest_collection_modifyitems(items):
    """Tests with the shared cluster get the marker `engines`."""
    for item in items:
        if "shared_cluster" in item.fixturenames:
            item.add_marker("engines")


@pytest.fixture(scope="session")
def run_ranks():
    """``run_ranks(size, function, *args)``: what ``function(world, *args)`` returns on each of `size` real ranks.

    `function` is a module-level function of the test. An error on a rank is raised here, its traceback as the cause.
    """
    from ranks import RankPool

    return RankPool()


@pytest.fixture(params=["shared memory", "shared weights", "process group", "two hosts"])
def run_on_each_channel(request, run_ranks):
    """`run_ranks`, once through each kind of channel."""
    return functools.partial(run_ranks, channel=request.param)


@pytest.fixture(scope="session", autouse=True)
def _session_home(tmp_path_factory):
    """Records of processes that outlive one test go to a folder of the session."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell would ignore interrupts
    resource_tracker.ensure_running()  # started here, so that it does not look like a leak of some test
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NBDIST_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True)
def home(tmp_path_factory):
    """``$NBDIST_HOME`` of this test, an empty folder; and the check that the test leaks nothing."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("home")
        patch.setenv("NBDIST_HOME", str(folder))
        before = _Surroundings()
        yield folder
        before.check()


class _Surroundings:
    """What a test must not change. Fixtures of a wider scope are set up before it is recorded."""

    def __init__(self) -> None:
        self.processes = set(psutil.Process().children(recursive=True))
        self.threads = set(threading.enumerate())
        self.listening = _listening()
        self.shared_memory = _files()
        self.environment = _environment()
        self.torch_threads = _torch_threads()

    def check(self) -> None:
        # A process that is just being forked is not yet recognized as the shared cluster's.
        left = _lasting(lambda: [p for p in self._new_processes() if not _may_stay(p)])
        assert not left, f"left running: {left}"
        threads = [t for t in threading.enumerate() if t not in self.threads and not (t.daemon or _of_pool(t))]
        for thread in threads:
            thread.join(_GONE_WITHIN_S)
        assert not [t for t in threads if t.is_alive()], f"left running: {threads}"
        left = _lasting(lambda: _listening() - self.listening)
        assert not left, f"left listening: {left}"
        left = _left_files(self.shared_memory)
        assert not left, f"left in {_SHARED_MEMORY}: {left}"
        assert _environment() == self.environment
        if self.torch_threads is not None:
            assert _torch_threads() == self.torch_threads
        distributed = sys.modules.get("torch.distributed")
        assert distributed is None or not distributed.is_initialized(), "a process group is left"

    def _new_processes(self) -> list[psutil.Process]:
        new = set(psutil.Process().children(recursive=True)) - self.processes
        return psutil.wait_procs(new - _of_browsers(self.processes), timeout=0)[1] if new else []


def _of_browsers(processes: set[psutil.Process]) -> set[psutil.Process]:
    """The children of browsers that ran before: browsers start and end them at any time."""
    children: set[psutil.Process] = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("chrom"):
                children.update(process.children(recursive=True))
    return children


def _of_pool(thread: threading.Thread) -> bool:
    """Whether a thread is of an event loop's pool: Playwright's stays for all browser tests."""
    return thread.name.startswith("asyncio_")


def _listening() -> set[tuple[str, int]]:
    connections = psutil.Process().net_connections("inet")
    theirs = {agents._address.rpartition(":")[2] for agents in _shared_agents()}
    return {tuple(c.laddr) for c in connections if c.status == psutil.CONN_LISTEN and str(c.laddr.port) not in theirs}


def _files() -> set[str]:
    return set(os.listdir(_SHARED_MEMORY)) if _SHARED_MEMORY.is_dir() else set()


def _left_files(before: set[str]) -> set[str]:
    """New files that stay; other programs' files come and go."""
    first = _files() - before
    return _lasting(lambda: first & _files())


def _lasting(look: Callable[[], Any]) -> Any:
    """What `look` still returns after a grace period."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while (left := look()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return left


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _OTHERS_VARIABLES}


def _torch_threads() -> int | None:
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


@pytest.fixture(scope="session", autouse=True)
def _late():
    """Under `conditions.py late`, `Cluster.train` returns late: a background run that is not held is over."""
    late_s = float(os.environ.get("NBDIST_TEST_LATE_S", "0"))
    if not late_s:
        yield
        return
    from nbdist import Cluster

    train = Cluster.train

    @functools.wraps(train)
    def late(*args, **options):
        run = train(*args, **options)
        time.sleep(late_s if options.get("background") else 0.0)
        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Cluster, "train", late)
        yield


def _command(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):  # it has just ended
        return " ".join(process.cmdline())
    return ""


@pytest.fixture(scope="session")
def shared_cluster(tmp_path_factory):
    """The one cluster of this process, see `cluster`; and the check that no cluster of any test leaks anything."""
    import tempfile

    from shared_cluster import MARK, SharedCluster, marked

    temporary = tmp_path_factory.mktemp("temporary")
    before = _files()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(MARK, str(os.getpid()))
        patch.setenv("TMPDIR", str(temporary))
        patch.setattr(tempfile, "tempdir", str(temporary))
        shared = SharedCluster()
        shared.ready()  # here, so that the engines write their records into the session's home
        yield shared
        shared.end()

        def ours():
            return [p for p in marked() if any(name in _command(p) for name in ("nbdist.cluster", "ipyparallel"))]

        left = _lasting(ours)
        assert not left, f"left running: {left}"
    assert not list(temporary.glob("nbdist-*"))
    assert not _left_files(before)


@pytest.fixture
def cluster(shared_cluster):
    """A running cluster of two CPU engines, the same for all tests; a test may stop it or kill an engine."""
    cluster = shared_cluster.ready()
    yield cluster
    left = _lasting(shared_cluster.extra_processes)
    assert not left, f"engines have left processes running: {left}"


def _may_stay(process: psutil.Process) -> bool:
    return _of_shared_cluster(process) or _of_waiting_host(process)


def _shared_agents() -> list[Any]:
    """The agents that tests over several hosts share, one after another; `tests/hosts` ends them. Others leave none."""
    waiting = sys.modules.get("nbdist.cluster.hosts.waiting_hosts")
    return list(waiting._agents.values()) if waiting is not None and "NBDIST_TEST_HOSTS" in os.environ else []


def _of_waiting_host(process: psutil.Process) -> bool:
    """Whether a process is the ssh to a host of `_shared_agents`, or what else starts it there, or a child of that."""
    agents = [agent for agents in _shared_agents() for agent in agents._agents.values()]
    programs = {agent.program.pid for agent in agents if agent.program is not None}
    return bool(programs) and not programs.isdisjoint({process.pid, *(parent.pid for parent in process.parents())})


def _of_shared_cluster(process: psutil.Process) -> bool:
    """Whether a process belongs to the shared cluster, such as a replaced engine."""
    module = sys.modules.get("shared_cluster")
    return module is not None and module.SharedCluster().owns(process)

"""Run the tests as on slower machines: no test may depend on durations.

    python tests/conditions.py [CONDITION ...] [-- ARGUMENTS OF PYTEST]

    plain   unchanged
    busy    beside two busy loops a core
    one     on one core
    half    on half of one core: by a cgroup quota where that is allowed, else the tests and their processes are stopped
            in every other tenth of a second, which a few tests notice
    late    each wait of a test, and each start of a run, returns two seconds late: whatever is not held is over then

``make test-conditions`` runs all of them.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

BUSY_LOOPS_A_CORE = 2
SLICE_S = 0.1
REMOVED_WITHIN_S = 300.0
LATE_S = "2"
TESTS = ["-m", "not hf and not compatibility and not parity and not browser and not notebooks and not gpu"]


@contextlib.contextmanager
def busy_loops() -> Iterator[None]:
    """Two busy loops per core, during the block."""
    count = BUSY_LOOPS_A_CORE * len(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def halved(pytest: subprocess.Popen[bytes]) -> None:
    """Stop and continue a process and its descendants, in turn, until it ends.

    Processes that a test has stopped itself stay stopped.
    """
    never, root = threading.Event(), psutil.Process(pytest.pid)
    while pytest.poll() is None:
        stopped, there = [], [root]
        with contextlib.suppress(psutil.Error):
            there += root.children(recursive=True)
        for process in there:
            with contextlib.suppress(psutil.Error):
                if process.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                    process.suspend()
                    stopped.append(process)
        try:
            never.wait(SLICE_S)
        finally:  # also after an interrupt
            for process in stopped:
                with contextlib.suppress(psutil.Error):
                    process.resume()
        never.wait(SLICE_S)


@contextlib.contextmanager
def quota() -> Iterator[Path | None]:
    """A control group, of version 1 or 2, whose processes have half a core; None if that is not allowed."""
    for parent, name, value in (("cpu", "cpu.cfs_quota_us", "50000"), ("", "cpu.max", "50000 100000")):
        group = Path("/sys/fs/cgroup", parent, f"nbdist-{os.getpid()}")
        try:
            group.mkdir()
            limit = group / name
            if not limit.exists():  # not a cgroup filesystem
                group.rmdir()
                continue
            limit.write_text(value)
        except OSError:
            continue
        try:
            yield group
        finally:
            _remove(group)
        return
    yield None


def _remove(group: Path) -> None:
    """Remove a control group, once the processes in it that are just ending have ended."""
    deadline = time.monotonic() + REMOVED_WITHIN_S
    while True:
        try:
            return group.rmdir()
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(SLICE_S)


def run(condition: str, arguments: list[str]) -> int:
    """Run pytest under a condition; returns its status."""
    command, environment = [sys.executable, "-m", "pytest", "-q", *arguments], dict(os.environ)
    with contextlib.ExitStack() as stack:
        if condition == "busy":
            stack.enter_context(busy_loops())
        if condition == "late":
            environment["NBDIST_TEST_LATE_S"] = LATE_S
        if condition in ("one", "half"):
            core = min(os.sched_getaffinity(0))
            command = ["taskset", "-c", str(core), *command]
        group = stack.enter_context(quota()) if condition == "half" else None
        if group is not None:
            command = ["sh", "-c", 'printf %s $$ > "$0" && exec "$@"', str(group / "cgroup.procs"), *command]
        pytest = subprocess.Popen(command, env=environment)
        stack.callback(pytest.wait)
        stack.callback(pytest.terminate)  # nothing, once it has ended
        if condition == "half" and group is None:
            halved(pytest)
        return pytest.wait()


def main() -> int:
    """Run the given conditions; returns how many failed."""
    given = sys.argv[1:]
    cut = given.index("--") if "--" in given else len(given)
    conditions, arguments = given[:cut] or ["plain", "busy", "one", "half", "late"], given[cut + 1 :] or TESTS
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    failed = []
    for condition in conditions:
        print(f"== {condition}: pytest {' '.join(arguments)}", flush=True)
        if run(condition, arguments):
            failed.append(condition)
    print(f"failed: {', '.join(failed) or 'none'}")
    return len(failed)


if __name__ == "__main__":
    raise SystemExit(main() > 0)

"""Stack dumps of running processes."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from nbdist.cluster.cells.cell_run import until_next_check
from nbdist.engine import stack_dump


@pytest.mark.engines
def test_the_dump_file_does_not_grow(cluster):
    """It holds only the newest dump."""
    files = [Path(engine.stacks) for engine in cluster.engines]
    sizes = []
    for _ in range(4):
        assert ["idle", "idle"] == [rank.state for rank in cluster.where().ranks]
        sizes.append(max(file.stat().st_size for file in files))
    assert max(sizes) < 2 * min(sizes)


DUMPED_AFTER_A_FAILED_CALL = """
import ctypes, signal
libc = ctypes.CDLL(None, use_errno=True)
ctypes.set_errno(11)
getattr(libc, "raise")(signal.SIGUSR1)
assert 11 == ctypes.get_errno()
"""


@pytest.mark.engines
def test_a_dump_does_not_change_why_a_system_call_failed(cluster):
    """Else a run that was looked at ended now and then: "another rank is gone ([Errno 0] Error)"."""
    cluster.execute(DUMPED_AFTER_A_FAILED_CALL).wait()


BUSY = """
import os, threading, time
from nbdist.engine import parent_watch, stack_dump

def deep(n):
    return n and deep(n - 1)

def churn():
    while True:
        deep(900)

os.environ[parent_watch.FOLDER_VARIABLE] = os.getcwd()
print(stack_dump.enable()["stacks"], flush=True)
for _ in range(3):
    threading.Thread(target=churn, daemon=True).start()

def in_main():
    while True:
        time.sleep(0.001)

in_main()
"""


def test_busy_threads_do_not_end_a_dumped_process(tmp_path):
    """Their frames come and go while the handler runs; the stack is the main thread's."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        try:
            stacks = process.stdout.readline().strip()
            for _ in range(60):
                frames = stack_dump.request(process.pid, stacks)
                assert process.poll() is None
                if "in_main" in (names := [frame.name for frame in frames]):
                    break
            assert ["<module>", "in_main"] == names[:2]
            for _ in range(60):
                assert "deep" not in [frame.name for frame in stack_dump.request(process.pid, stacks)]
        finally:
            process.kill()


def test_a_process_that_has_ended_writes_nothing(tmp_path):
    """Nor does one that never was."""
    assert stack_dump.request(2**22 - 1, str(tmp_path / "none")) is None


def test_a_long_cell_is_checked_less_and_less_often():
    """At first every few seconds, then once a minute; and soon again if it seems deadlocked."""
    looks = list(itertools.accumulate(range(6), lambda last, _: until_next_check(last, deadlocked=False), initial=3.0))
    assert [3.0, 6.0, 12.0, 24.0, 48.0, 60.0, 60.0] == looks
    assert 3.0 == until_next_check(60.0, deadlocked=True)

"""Processes: a mark names one for good, and one that has ended is known as such at every instant."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from nbdist.process_mark import alive, has_ended, process_mark


@pytest.fixture
def child():
    """A process that waits for its standard input."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def test_a_mark_names_a_process_although_pids_are_reused(child):
    """It holds when the process was started, and another start is another process."""
    mark = process_mark(child.pid)
    pid, _, started = mark.partition(":")
    assert child.pid == int(pid)
    assert alive(mark)
    assert not alive(f"{pid}:{int(started) - 1}")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the start time is that of the system's clock")
def test_a_mark_stays_when_the_clock_is_set(child, monkeypatch):
    """The boot time that the system tells is moved then, and with it all times that are added to it."""
    mark = process_mark(child.pid)
    started_s = psutil.Process(child.pid).create_time()
    boot_s = psutil._pslinux.boot_time()
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: boot_s + 5.0)
    assert psutil.Process(child.pid).create_time() == pytest.approx(started_s + 5.0)
    assert alive(mark)


def test_a_killed_process_is_not_alive_before_and_after_it_is_reaped(child):
    """A zombie has ended too."""
    process, mark = psutil.Process(child.pid), process_mark(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.status() == psutil.STATUS_ZOMBIE
    assert has_ended(process)
    assert not alive(mark)
    child.wait()
    assert has_ended(process)
    assert not alive(mark)


def test_a_process_that_is_being_reaped_has_ended(monkeypatch):
    """For an instant it is neither a zombie nor gone; no process can be held there."""
    process = psutil.Process()
    monkeypatch.setattr(process, "status", lambda: psutil.STATUS_DEAD)
    assert has_ended(process)

"""Stack dumps of running engines: on a signal, a process writes the stack of its main thread to a file.

Python's `faulthandler` writes them from a signal handler in C, so this works even while the process hangs in C or holds
the GIL. It costs nothing until a dump is requested. Not the stacks of all threads: those that go on meanwhile may free
the frames that the handler reads, and the process would end with a segmentation fault.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import re
import signal
import threading
import time
from pathlib import Path
from traceback import FrameSummary
from typing import Any

import psutil

from nbdist.engine.parent_watch import FOLDER_VARIABLE

__all__ = ["enable", "is_stopped", "request"]

_SIGNAL = getattr(signal, "SIGUSR1", None)
_POLL_S = 0.005
_POLLS, _POLLS_A_SIGNAL = 200, 20
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_one_at_a_time = threading.Lock()


class _Enabled:
    file: Any = None  # the handler writes to its descriptor, so it has to stay open


def enable() -> dict[str, Any]:
    """Register the signal handler; returns the arguments of `request`, {} without SIGUSR1.

    Runs on an engine, in its main thread.
    """
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if _SIGNAL is None or not os.path.isdir(folder):
        return {}
    if _Enabled.file is None:
        _Enabled.file = open(os.path.join(folder, f"stacks-{os.getpid()}"), "ab")  # noqa: SIM115
        # Only on its way to an earlier handler does faulthandler's put `errno` back (CPython 3.6 to 3.13). Without one,
        # a system call that failed just before the signal raises "[Errno 0] Error", where a non-blocking read, say,
        # is to raise BlockingIOError. The price: a chained handler is registered without SA_RESTART, so a blocking call
        # in C ends with EINTR, as it does for each signal that Python itself handles.
        signal.signal(_SIGNAL, lambda *_: None)
        faulthandler.register(_SIGNAL, _Enabled.file, all_threads=False, chain=True)
    return {"stacks": _Enabled.file.name}


def request(pid: int, stacks: str) -> list[FrameSummary] | None:
    """Request a stack dump: the frames of the main thread of a process of this host, outermost first.

    Args:
        pid: The process.
        stacks: The file that it writes to, see `enable`.

    Returns:
        The frames; None if it writes nothing: it is stopped, or has ended.
    """
    with contextlib.suppress(ProcessLookupError, FileNotFoundError):
        file = Path(stacks)
        if _SIGNAL is None or not psutil.pid_exists(pid) or is_stopped(pid):
            return None
        with _one_at_a_time:  # or one request would truncate the dump that another reads
            os.truncate(file, 0)  # the process appends; so the file holds only the newest dump
            previous = b""
            for poll in range(_POLLS):
                if poll % _POLLS_A_SIGNAL == 0 and not previous:
                    _signal_main_thread(pid)  # again, for one that comes while the handler returns is lost
                time.sleep(_POLL_S)
                now = file.read_bytes()
                if now and now == previous:  # unchanged, so complete
                    return _frames(now.decode(errors="replace"))
                previous = now
    return None


def is_stopped(pid: int) -> bool:
    """Whether a process of this host is stopped by a signal (SIGSTOP), until SIGCONT."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _signal_main_thread(pid: int) -> None:
    assert _SIGNAL is not None
    tgkill = getattr(ctypes.CDLL(None), "tgkill", None)
    if tgkill is None:
        os.kill(pid, _SIGNAL)  # which the main thread receives, unless it blocks the signal
    elif tgkill(pid, pid, _SIGNAL):
        raise ProcessLookupError


def _frames(text: str) -> list[FrameSummary]:
    found = [FrameSummary(file, int(line), name, lookup_line=False) for file, line, name in _FRAME.findall(text)]
    return found[::-1]

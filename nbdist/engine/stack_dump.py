"""Where a process stands, told by itself even while it hangs: what it writes of its threads when it is asked.

Python's `faulthandler` writes it from a signal handler, in C. So a process that waits in C for ever, or holds the
interpreter's lock, is heard too. Nothing is done until somebody asks.
"""

from __future__ import annotations

import contextlib
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

__all__ = ["answer_from", "ask", "is_stopped"]

_SIGNAL = getattr(signal, "SIGUSR1", None)
_POLL_S = 0.005
_ANSWERED_WITHIN_S = 1.0
_THREAD = re.compile(r"(?:Current thread|Thread) 0x([0-9a-f]+)[^\n]*\n((?:  [^\n]*\n)+)")
_FRAME = re.compile(r'^  File "(.*)", line (\d+) in (.*)$', re.MULTILINE)
_one_at_a_time = threading.Lock()


class _Answering:
    file: Any = None  # the handler writes to its descriptor, so it has to stay open


def answer_from() -> dict[str, Any]:
    """Be ready to answer; returns what `ask` needs, nothing where this host cannot. Runs on an engine."""
    folder = os.environ.get(FOLDER_VARIABLE, "")
    if _SIGNAL is None or not os.path.isdir(folder):
        return {}
    if _Answering.file is None:
        _Answering.file = open(os.path.join(folder, f"stacks-{os.getpid()}"), "ab")  # noqa: SIM115
        faulthandler.register(_SIGNAL, _Answering.file, all_threads=True, chain=False)
    return {"stacks": _Answering.file.name, "main_thread": threading.main_thread().ident}


def ask(pid: int, stacks: str, main_thread: int) -> list[FrameSummary] | None:
    """Where the main thread of a process of this host stands, outermost first.

    Args:
        pid: Which process.
        stacks: The file that it writes to, see `answer_from`.
        main_thread: Its main thread.

    Returns:
        The frames; None where it does not answer: it is stopped, or has ended.
    """
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):
        process, file = psutil.Process(pid), Path(stacks)
        if _SIGNAL is None or is_stopped(pid):
            return None
        with _one_at_a_time:  # or one would take away what another one reads
            os.truncate(file, 0)  # the process appends, so the file holds one answer, however often it is asked
            told = b""
            process.send_signal(_SIGNAL)
            deadline = time.monotonic() + _ANSWERED_WITHIN_S
            while time.monotonic() < deadline:
                time.sleep(_POLL_S)
                now = file.read_bytes()
                if now and now == told:
                    return _frames(now.decode(errors="replace"), main_thread)
                told = now
    return None


def is_stopped(pid: int) -> bool:
    """Whether a process of this host was stopped by a signal, and runs no instruction until it is continued."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    return False


def _frames(text: str, thread: int) -> list[FrameSummary] | None:
    for number, lines in _THREAD.findall(text):
        if int(number, 16) == thread:
            found = [
                FrameSummary(file, int(line), name, lookup_line=False) for file, line, name in _FRAME.findall(lines)
            ]
            return found[::-1]
    return None

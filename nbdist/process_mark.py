"""A process of this host: its mark, which tells it from others that get its pid, and whether it has ended."""

from __future__ import annotations

from pathlib import Path

import psutil

__all__ = ["alive", "has_ended", "process_mark"]

_ENDED = psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD  # a process is "dead" for an instant while its parent reaps it


def process_mark(pid: int) -> str:
    """Names a process uniquely, although pids are reused: ``pid:started``, the same in whichever process it is asked.

    Raises:
        psutil.NoSuchProcess: There is none.
    """
    try:
        # Ticks since the boot. psutil adds the boot time, which moves whenever the system's clock is set.
        started = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19].decode()
    except OSError:
        started = f"{psutil.Process(pid).create_time():.2f}"
    return f"{pid}:{started}"


def alive(mark: str) -> bool:
    """Whether the process that `mark` names still runs."""
    pid = int(mark.partition(":")[0])
    try:
        return process_mark(pid) == mark and not has_ended(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


def has_ended(process: psutil.Process) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return not process.is_running() or process.status() in _ENDED
    except psutil.NoSuchProcess:
        return True

"""Data-loading processes: they end with their rank, however it ended."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import context
from typing import Any

__all__ = ["EndsWithRank"]

_PR_SET_PDEATHSIG = 1  # from prctl.h


class EndsWithRank:
    """What a data-loading process does first.

    torch looks every few seconds for a rank that is gone, but not for one that was gone when it first looked; so where
    the system offers it, the process is killed with its rank.

    Args:
        then: What the user has it do, or None.
    """

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then
        self._rank_pid = os.getpid()

    def __call__(self, worker: int) -> None:
        """Called in the process, by torch."""
        if sys.platform == "linux":
            # The signal comes when the thread ends that forked us: the one that trains.
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        from_server = isinstance(multiprocessing.current_process(), getattr(context, "ForkServerProcess", ()))
        if os.name == "posix" and not from_server and os.getppid() != self._rank_pid:
            os._exit(1)
        if self._then is not None:
            self._then(worker)

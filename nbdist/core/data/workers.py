"""Data-loading processes: they end with their rank, however it ended."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import context
from typing import Any

__all__ = ["EndsWithRank"]


class EndsWithRank:
    """What a data-loading process does first.

    torch looks every few seconds whether its rank is gone, but does not see that of one that was gone when it first
    looked. To be killed with the rank would leave files in shared memory that the process was about to unlink.

    Args:
        then: What the user has it do, or None.
    """

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then
        self._rank_pid = os.getpid()

    def __call__(self, worker: int) -> None:
        """Called in the process, by torch."""
        from_server = isinstance(multiprocessing.current_process(), getattr(context, "ForkServerProcess", ()))
        if os.name == "posix" and not from_server and os.getppid() != self._rank_pid:
            os._exit(1)
        if self._then is not None:
            self._then(worker)

"""DataLoader worker processes: they end with their rank, even if it is killed, and send whatever they have loaded."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import context
from typing import Any

from nbdist.upstream.multiprocessing_private import send_anything

__all__ = ["EndsWithRank"]


class EndsWithRank:
    """A ``worker_init_fn`` that ends a worker whose rank died before the worker started; see also `send_anything`.

    torch's worker polls whether its parent has changed, but misses a parent that died before the first poll. The worker
    is not killed together with the rank (PR_SET_PDEATHSIG), because it may still have to unlink shared memory.

    Args:
        then: The user's own ``worker_init_fn``, or None.
    """

    def __init__(self, then: Callable[[int], Any] | None) -> None:
        self._then = then
        self._rank_pid = os.getpid()

    def __call__(self, worker: int) -> None:
        """Called by torch in the worker process."""
        from_server = isinstance(multiprocessing.current_process(), getattr(context, "ForkServerProcess", ()))
        if os.name == "posix" and not from_server and os.getppid() != self._rank_pid:
            os._exit(1)
        send_anything()
        if self._then is not None:
            self._then(worker)

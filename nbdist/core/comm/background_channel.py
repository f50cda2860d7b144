"""Background channel: sums that run in a thread, beside the computation, one after another."""

from __future__ import annotations

import functools
import os
import queue
import threading
from collections.abc import Callable

import torch

from nbdist.core.comm.channel import Channel, Pending
from nbdist.core.comm.comm_timer import comm_timer

__all__ = ["BackgroundChannel"]


class _Started(Pending):
    """A collective that the thread runs, or will.

    Args:
        run: The collective.
    """

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run
        self._ended = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> None:
        """Run it. In the thread."""
        try:
            self._run()
        except BaseException as error:
            self._error = error
        self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether it has run."""
        return self._ended.is_set()

    def wait(self) -> None:
        """See `Pending`."""
        with comm_timer.communicating():
            self._ended.wait()
        if self._error is not None:
            raise self._error


class BackgroundChannel(Channel):
    """Runs the collectives of another channel, which nobody else may use.

    Args:
        channel: The other one.
        hang_up: Makes what it waits for fail at once.
    """

    overlaps = True

    def __init__(self, channel: Channel, hang_up: Callable[[], None]) -> None:
        super().__init__(channel.rank, channel.size, channel.device)
        self._channel, self._hang_up = channel, hang_up
        self._owner = os.getpid()
        self._last: _Started | None = None
        self._queue: queue.SimpleQueue[_Started | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, daemon=True, name="nbdist-sums")
        self._thread.start()

    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        """See `Channel`."""
        return self._start(functools.partial(self._channel.all_reduce_, tensor))

    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        """See `Channel`."""
        return self._start(functools.partial(self._channel.broadcast_, tensor, source))

    def zeros(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """See `Channel`; no collective may be running."""
        return self._channel.zeros(numel, dtype)

    def free(self, tensor: torch.Tensor) -> None:
        """See `Channel`; where one still runs after an error, the channel is closed first."""
        if self._last is not None and not self._last.ended:
            self.close()
        self._channel.free(tensor)

    def close(self) -> None:
        """See `Channel`; afterwards no memory is read or written."""
        if self._owner == os.getpid():  # a fork has no thread, and its shutdown would end this process's connections
            self._hang_up()
            self._queue.put(None)
            self._thread.join()
        self._channel.close()

    def _start(self, run: Callable[[], None]) -> Pending:
        self._last = started = _Started(run)
        self._queue.put(started)
        return started

    def _serve(self) -> None:
        while (started := self._queue.get()) is not None:
            started.run()

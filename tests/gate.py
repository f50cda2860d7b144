"""A gate: ranks wait at it until the test opens it, so that a test acts on a run at a known step.

A test that acts on a run holds it first. No test relies on a run being slow enough to be still running, or fast enough
to be over.
"""

from __future__ import annotations

import inspect
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared_cluster import until

_POLL_S = 0.005
_HELD_S = 0.2  # at least: longer than rank 0's poll interval for commands (nbdist/core/control/command_log.py)


class NotedLock:
    """Takes the place of a lock, and says when a second thread waits for it."""

    def __init__(self, lock):
        self.lock, self.waited_for = lock, threading.Event()

    def __enter__(self):
        if not self.lock.acquire(blocking=False):
            self.waited_for.set()
            self.lock.acquire()

    def __exit__(self, *_error):
        self.lock.release()


class Gate:
    """Holds the ranks of a run, at named places or after numbered steps, until it is opened.

    As ``lr_scheduler=Gate(tmp_path, 5, 9)`` it holds every rank after its 5th and its 9th update, on any mesh: the
    count is the scheduler's, which snapshots save, so it stays right on ranks that resume. Elsewhere a function of the
    test calls `hold`. Commands given while ranks are held are applied in the next step.

    Args:
        folder: Shared by the ranks and the test, for marker files.
        *steps: After which steps to hold.
        scheduler: The factory of the scheduler to use; by default one that does not change the rates.
    """

    def __init__(self, folder: Path, *steps: int, scheduler: Callable[[Any], Any] | None = None) -> None:
        self.folder = Path(folder, "gate")
        self.folder.mkdir(exist_ok=True)
        self.steps = steps
        self.scheduler = scheduler

    def __call__(self, optimizer):
        """Make the scheduler, as the option ``lr_scheduler`` does on every rank."""
        make = self.scheduler or (lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))
        scheduler = make(optimizer)

        def updated(*_):
            if (step := scheduler.last_epoch + 1) in self.steps:
                self.hold(step)

        optimizer.register_step_post_hook(updated)
        return scheduler

    def hold(self, place: int | str) -> None:
        """Wait until the gate is opened; returns at once if it is open. Called by ranks."""
        arrived_s = time.monotonic()
        if self._opened(place):
            return
        self._mark(place, int(os.environ.get("RANK", "0"))).write_text(str(os.getpid()))
        while not self._opened(place):
            time.sleep(_POLL_S)
        time.sleep(max(0.0, arrived_s + _HELD_S - time.monotonic()))

    def wait(self, place: int | str, *, ranks: int = 2, run: Any = None) -> None:
        """Wait until ranks are held at a place. Called by the test.

        Args:
            place: The place.
            ranks: How many, from rank 0 on.
            run: The held run: if it ends before, this fails at once.
        """

        def held() -> bool:
            ended = run is not None and run.ended  # read first: a rank held before the end counts
            missing = [rank for rank in range(ranks) if not self._mark(place, rank).exists()]
            assert not (missing and ended), (
                f"the run has {run.state} at step {run.progress.step}, and rank {missing[0]} was never held at the "
                f"gate {place!r}: it does not pass there"
            )
            return not missing

        until(held)

    def is_reached(self, place: int | str, rank: int = 0) -> bool:
        """Whether a rank is held at a place, or was. Called by the test."""
        return self._mark(place, rank).exists()

    def open(self, *places: int | str) -> None:
        """Release the ranks held at these places, or at all of them, now and later. Called by the test."""
        for name in map(_file_name, places) if places else ["all"]:
            (self.folder / f"open {name}").touch()

    def _opened(self, place: int | str) -> bool:
        return (self.folder / "open all").exists() or (self.folder / f"open {_file_name(place)}").exists()

    def _mark(self, place: int | str, rank: int) -> Path:
        return self.folder / f"held {_file_name(place)} rank{rank}"


def _file_name(place: int | str) -> str:
    return f"step{place}" if isinstance(place, int) else place


def main_thread_is_in(function):
    """Whether the main thread of this process runs `function`, directly or in what that calls."""
    frame = sys._current_frames()[threading.main_thread().ident]
    code = inspect.unwrap(function).__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None

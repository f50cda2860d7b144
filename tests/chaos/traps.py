"""Traps: a rank kills itself, fails or hangs at an exact place, once; and each rank logs each step.

A trap is a file, named by phase, rank and step, whose text is what is to happen. A rank that reaches it removes it
first, so it acts once, however often the step runs. Ranks and tests share that folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import torch
from torch.utils.data import get_worker_info

PHASES = ("forward", "backward", "update", "updated")
"""Where a rank may be in a step: before and after each half of it."""


class Trapped(Exception):
    """What a rank fails with."""


class Traps:
    """The traps of one run, and its ranks' step log.

    Args:
        folder: Holds both; the caller removes it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._owner = os.getpid()
        self._scheduler = None

    def __getstate__(self):
        return {"folder": self.folder, "_owner": self._owner, "_scheduler": None}

    def __setstate__(self, state):
        self.__dict__.update(state)
        if os.getpid() != self._owner:
            self.reach("unpack", self._starts())
            self.begin()

    def set(self, phase, rank, step, what="kill"):
        """Let `what` happen when `rank` gets to `phase` after `step` steps: kill, kill SECONDS, raise, hang ...

        Of data, `step` is the number of a sample, which any rank may read; of unpack, how often that was done before.
        """
        Path(self.folder, f"{phase}-{rank}-{step}").write_text(what)

    def clear(self):
        """Remove the traps that no rank has reached."""
        for name in self.left:
            Path(self.folder, name).unlink(missing_ok=True)

    @property
    def left(self):
        """Traps that no rank has reached."""
        return [path.name for path in Path(self.folder).iterdir() if path.name.count("-") == 2]

    def watch(self, optimizer, scheduler):
        """Follow a rank's updates; `scheduler` counts them, and is saved and restored like all state."""
        self._scheduler = scheduler
        optimizer.register_step_pre_hook(lambda *_: self.reach("update"))
        optimizer.register_step_post_hook(lambda *_: self._updated())

    def reach(self, phase, step=None):
        """This rank is at `phase`."""
        rank = os.environ.get("RANK", "0") if phase != "data" else "any"
        step = self._step if step is None else step
        path = os.path.join(self.folder, f"{phase}-{rank}-{step}")
        try:
            with open(path) as file:
                what = file.read()
            os.unlink(path)
        except FileNotFoundError:
            return
        self._snap(*what.split(), place=f"{phase} after step {step}")

    def _starts(self):
        with contextlib.suppress(FileNotFoundError):
            return self._log_path().read_text().count("begin")
        return 0

    def begin(self):
        """Log that this process starts or resumes the run."""
        self._log("begin")

    @property
    def _step(self):
        return 0 if self._scheduler is None else self._scheduler.last_epoch

    def _updated(self):
        self._log(f"{self._step + 1}")
        self.reach("updated")

    def _log_path(self):
        return Path(self.folder, f"rank{os.environ.get('RANK', '0')}")

    def _log(self, word):
        with self._log_path().open("a") as file:
            file.write(f"{time.time()} {word}\n")

    def _snap(self, what, *more, place):
        if what == "kill" and more:
            threading.Timer(float(more[0]), self.kill, [os.getpid()]).start()
        elif what == "kill":
            self.kill(os.getpid() if get_worker_info() is None else os.getppid())
        elif what == "segfault":
            note(self.folder, "killed")
            ctypes.string_at(0)
        elif what == "raise":
            note(self.folder, "raised")
            raise Trapped(f"trapped in {place}")
        elif what == "sigstop":
            note(self.folder, "killed")
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "hang":
            time.sleep(1000)
        elif what == "hang_in_c":  # as a library does that waits for a device: no signal gets through, nor the GIL away
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            ctypes.PyDLL(None).sleep(1000)
        else:
            raise ValueError(what)

    def kill(self, *pids):
        """Kill processes, and log the time."""
        note(self.folder, "killed")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def times_s(self, what):
        """When ranks have been "killed", or have "raised"."""
        path = Path(self.folder, what)
        return [float(line) for line in path.read_text().split()] if path.exists() else []

    def recovery_seconds(self):
        """For each kill, how long it took until every rank had done a step in a new world.

        A kill after the last step has no such time.
        """
        logs = [
            [(float(time_s), word) for time_s, word in map(str.split, path.read_text().splitlines())]
            for path in Path(self.folder).glob("rank*")
        ]
        found = []
        for killed_s in self.times_s("killed"):
            firsts = [_first_step_s(lines, killed_s) for lines in logs]
            if all(firsts):
                found.append(max(firsts) - killed_s)
        return found


def note(folder, what):
    """Write the current time into a log."""
    with open(os.path.join(folder, what), "a") as file:
        file.write(f"{time.time()}\n")


def _first_step_s(lines, after_s):
    """When a rank finished its first step after a restart; None if it never has."""
    restarted = False
    for time_s, word in lines:
        if word == "begin":
            restarted |= time_s > after_s
        elif restarted:
            return time_s
    return None


class Rates:
    """A scheduler's factory that connects the traps to a rank's optimizer."""

    def __init__(self, traps: Traps) -> None:
        self.traps = traps

    def __call__(self, optimizer):
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.9)
        self.traps.watch(optimizer, scheduler)
        return scheduler

"""The lease of a folder of checkpoints: the right of one run at a time to write into it.

Who wants it puts a file of its own into the folder and looks for those of others only then: of two that come at the
same time, at least one sees the other. Who has it says so in its file, again and again. A run whose file has not
changed for `LEASE_S`, by the clock of who looks, is dead, or might as well be: its file goes, by which it learns that
it has lost the lease should it wake up. Nothing is needed of a file system but to create, list, read and remove; no
locks, no links, no clocks that agree. The number of a process is asked only to wait less for one that has ended here.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

from nbdist.errors import PlanError
from nbdist.telemetry.host import host_id, host_name

__all__ = ["LEASE_S", "Lease"]

LEASE_S = 15.0
"""A run that has not said for so long that it lives has lost its leases."""
_BEAT_S = 1.0
_PATIENCE_S = 10.0
"""For so long a run that lives may still be about to end: engines may outlive a killed notebook as long."""
_NAP_S = 0.02
_PREFIX = ".lease-"
_BEAT_FORMAT = "{:012d}"
_WANTED, _HELD = "wanted", "held"


class _Rival(NamedTuple):
    """What another run's file says, or the nothing that can be read of it."""

    text: str
    about: dict[str, Any]


class Lease:
    """The right to write into a folder, once `acquire` has returned. Local: rank 0 alone has one.

    Args:
        folder: That of the checkpoints, which is there.
        run_id: Whose; a run succeeds itself at once, when its rank 0 is another process, say. Empty for no name.
    """

    def __init__(self, folder: str, run_id: str) -> None:
        self._folder = Path(folder)
        self._token = secrets.token_hex(8)
        self._path = self._folder / f"{_PREFIX}{self._token}"
        self._about = {
            "run": run_id, "host": host_name(), "host_id": host_id(), "pid": os.getpid(),
            "born": _born(os.getpid()),
        }  # fmt: skip
        self._beats = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="nbdist lease")

    def acquire(self) -> Lease:
        """Wait until nobody else has the lease, or seems about to let it go.

        Raises:
            PlanError: A run that lives has it.
            OSError: The folder cannot be written.
        """
        try:
            self._write(_WANTED)
            self._thread.start()
            dead = self._outwait()
            self._write(_HELD)
            for path in dead:
                path.unlink(missing_ok=True)
        except BaseException:
            self.release()
            raise
        return self

    def confirm(self) -> None:
        """See that the lease is still ours, before something is done that two must not do at once.

        Raises:
            OSError: It is not, or the folder is gone.
        """
        with contextlib.suppress(FileNotFoundError):
            self._path.open("rb").close()  # a mere look may be answered from memory where a server has the folder
            return
        self._write(_HELD)  # somebody has removed it, with the folder perhaps
        for rival in self._rivals().values():
            self._path.unlink(missing_ok=True)
            raise BlockingIOError(11, f"{_described(rival)} writes into the folder now")

    def release(self) -> None:
        """Let another run have it. Twice is fine."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _outwait(self) -> list[Path]:
        """Wait until all others are dead or gone; returns the files of those that are dead."""
        began_s = time.monotonic()
        seen: dict[Path, tuple[str, float]] = {}  # what each said last, and since when
        lives: set[Path] = set()
        while True:
            now_s = time.monotonic()
            dead, rivals = [], self._rivals()
            for path, rival in rivals.items():
                text, since_s = seen.setdefault(path, (rival.text, now_s))
                if text != rival.text:
                    seen[path], since_s = (rival.text, now_s), now_s
                    lives.add(path)
                if self._is_dead(rival) or now_s - since_s >= LEASE_S:
                    dead.append(path)
            living = {path: rival for path, rival in rivals.items() if path not in dead}
            if not living:
                if self._path.exists():
                    return dead
                self._write(_WANTED)  # we had stood back
                continue
            held = [path for path, rival in living.items() if rival.about.get("state") == _HELD]
            if now_s - began_s >= _PATIENCE_S and lives.intersection(held):
                raise PlanError(
                    f"checkpoint={str(self._folder)!r} is being written by {_described(living[held[0]])}: wait until "
                    "that has ended, or name another folder."
                )
            if held or min(living) < self._path:  # of those that want it, one does not give way
                self._path.unlink(missing_ok=True)
            time.sleep(_NAP_S)

    def _rivals(self) -> dict[Path, _Rival]:
        rivals = {}
        for path in sorted(self._folder.glob(f"{_PREFIX}*")):
            if path == self._path:
                continue
            with contextlib.suppress(FileNotFoundError):
                text = path.read_text(encoding="utf-8", errors="replace")
                try:
                    about = json.loads(text.partition(" ")[2])
                except ValueError:  # it is just being written, or was when its run died
                    about = {}
                rivals[path] = _Rival(text, about if isinstance(about, dict) else {})
        return rivals

    def _is_dead(self, rival: _Rival) -> bool:
        """Whether there is proof that a run writes no more, so that nobody has to wait for its silence."""
        about = rival.about
        if about.get("run") and about["run"] == self._about["run"]:
            return True  # our own, on the rank that was 0 before
        if about.get("host_id") != self._about["host_id"] or about.get("born") is None:
            return False
        return bool(_born(about.get("pid")) != about["born"])

    def _write(self, state: str) -> None:
        text = f"{_BEAT_FORMAT.format(self._beats)} {json.dumps({**self._about, 'state': state})}"
        self._path.write_text(text, encoding="utf-8")

    def _beat(self) -> None:
        while not self._ended.wait(_BEAT_S):
            self._beats += 1
            with contextlib.suppress(OSError), self._path.open("r+b", buffering=0) as file:
                file.write(_BEAT_FORMAT.format(self._beats).encode())


def _described(rival: _Rival) -> str:
    about = rival.about
    run = f"run {about['run']}" if about.get("run") else "another run"
    return f"{run} (process {about.get('pid', '?')} on {about.get('host', '?')})"


def _born(pid: Any) -> int | None:
    """When a process of this host was started, in ticks since the host was; None where none is to be seen."""
    try:
        words = Path(f"/proc/{pid:d}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if words[0] in "ZX" else int(words[19])

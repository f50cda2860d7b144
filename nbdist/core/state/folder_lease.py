"""The lease of a checkpoint folder, a lock across hosts: only one run at a time writes into the folder.

A run that wants the lease first creates a file of its own in the folder, and only then looks for files of other runs:
of two that come at the same time, at least one sees the other. The holder rewrites its file every second (heartbeat).
A run whose file has not changed for `LEASE_S`, by the waiting run's clock, counts as dead: its file is removed, and
should that run wake up, the missing file shows it that the lease is lost. The file system needs only create, list,
read and remove: no locks, no links, no synchronized clocks. Process ids only shorten the wait for a run that ended on
this host.
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
"""A run without a heartbeat for so long has lost its leases."""
_BEAT_S = 1.0
_GRACE_S = 10.0
"""How long to wait for a live holder that may be ending: engines may outlive a killed notebook for so long."""
_POLL_S = 0.02
_PREFIX = ".lease-"
_BEAT_FORMAT = "{:012d}"
_WANTED, _HELD = "wanted", "held"


class _Rival(NamedTuple):
    """The content of another run's file; `about` is empty if it cannot be parsed."""

    text: str
    about: dict[str, Any]


class Lease:
    """The right to write into a folder, once `acquire` has returned. Local: only rank 0 has one.

    Args:
        folder: The checkpoint folder, which exists.
        run_id: The run's id; a run replaces its own lease at once, such as after a recovery. Empty without one.
    """

    def __init__(self, folder: str, run_id: str) -> None:
        self._folder = Path(folder)
        self._token = secrets.token_hex(8)
        self._path = self._folder / f"{_PREFIX}{self._token}"
        self._about = {
            "run": run_id, "host": host_name(), "host_id": host_id(), "pid": os.getpid(),
            "born": _start_ticks(os.getpid()),
        }  # fmt: skip
        self._beats = 0
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="nbdist lease")

    def acquire(self) -> Lease:
        """Wait until no other run holds the lease; gives up on a live holder after `_GRACE_S`.

        Raises:
            PlanError: A live run holds it.
            OSError: The folder cannot be written.
        """
        try:
            self._write(_WANTED)
            self._thread.start()
            dead = self._wait_for_rivals()
            self._write(_HELD)
            for path in dead:
                path.unlink(missing_ok=True)
        except BaseException:
            self.release()
            raise
        return self

    def confirm(self) -> None:
        """Check that this run still holds the lease, before a write that two runs must not do at once.

        Raises:
            OSError: It does not, or the folder is gone.
        """
        with contextlib.suppress(FileNotFoundError):
            self._path.open("rb").close()  # opened, since a network file system may answer `exists` from its cache
            return
        self._write(_HELD)  # it was removed, perhaps with the folder
        for rival in self._rivals().values():
            self._path.unlink(missing_ok=True)
            raise BlockingIOError(11, f"{_described(rival)} writes into the folder now")

    def release(self) -> None:
        """Release the lease. Twice is fine."""
        self._released.set()
        if self._thread.is_alive():
            self._thread.join()
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _wait_for_rivals(self) -> list[Path]:
        """Wait until all other runs are dead or gone; returns the files of dead ones."""
        began_s = time.monotonic()
        last_beats: dict[Path, tuple[str, float]] = {}  # each run's last content, and since when
        beating: set[Path] = set()
        while True:
            now_s = time.monotonic()
            dead, rivals = [], self._rivals()
            for path, rival in rivals.items():
                text, since_s = last_beats.setdefault(path, (rival.text, now_s))
                if text != rival.text:
                    last_beats[path], since_s = (rival.text, now_s), now_s
                    beating.add(path)
                if self._is_dead(rival) or now_s - since_s >= LEASE_S:
                    dead.append(path)
            living = {path: rival for path, rival in rivals.items() if path not in dead}
            if not living:
                if self._path.exists():
                    return dead
                self._write(_WANTED)  # removed below, to let another run go first
                continue
            held = [path for path, rival in living.items() if rival.about.get("state") == _HELD]
            if now_s - began_s >= _GRACE_S and beating.intersection(held):
                raise PlanError(
                    f"checkpoint={str(self._folder)!r} is being written by {_described(living[held[0]])}: wait until "
                    "that run has ended, or name another folder."
                )
            if held or min(living) < self._path:  # of runs that want it, the least path goes first
                self._path.unlink(missing_ok=True)
            time.sleep(_POLL_S)

    def _rivals(self) -> dict[Path, _Rival]:
        rivals = {}
        for path in sorted(self._folder.glob(f"{_PREFIX}*")):
            if path == self._path:
                continue
            with contextlib.suppress(FileNotFoundError):
                text = path.read_text(encoding="utf-8", errors="replace")
                try:
                    about = json.loads(text.partition(" ")[2])
                except ValueError:  # half written, now or when its run died
                    about = {}
                rivals[path] = _Rival(text, about if isinstance(about, dict) else {})
        return rivals

    def _is_dead(self, rival: _Rival) -> bool:
        """Whether a run certainly writes no more, so that there is no need to wait `LEASE_S`."""
        about = rival.about
        if about.get("run") and about["run"] == self._about["run"]:
            return True  # this run's former rank 0
        if about.get("host_id") != self._about["host_id"] or about.get("born") is None:
            return False
        return bool(_start_ticks(about.get("pid")) != about["born"])

    def _write(self, state: str) -> None:
        text = f"{_BEAT_FORMAT.format(self._beats)} {json.dumps({**self._about, 'state': state})}"
        self._path.write_text(text, encoding="utf-8")

    def _beat(self) -> None:
        while not self._released.wait(_BEAT_S):
            self._beats += 1
            with contextlib.suppress(OSError), self._path.open("r+b", buffering=0) as file:
                file.write(_BEAT_FORMAT.format(self._beats).encode())


def _described(rival: _Rival) -> str:
    about = rival.about
    run = f"run {about['run']}" if about.get("run") else "another run"
    return f"{run} (process {about.get('pid', '?')} on {about.get('host', '?')})"


def _start_ticks(pid: Any) -> int | None:
    """When a process of this host started, in ticks since boot; None if there is no such process."""
    try:
        words = Path(f"/proc/{pid:d}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError, TypeError):
        return None
    return None if words[0] in "ZX" else int(words[19])

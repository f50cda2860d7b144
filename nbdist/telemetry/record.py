"""The record of runs on disk: one folder a run, one JSON-lines file (log) a rank."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import time
from pathlib import Path

from nbdist.telemetry.host import host_name

__all__ = ["KEPT_RUNS", "cluster_record_path", "is_locked", "lock", "new_run_id", "record_path", "records"]

KEPT_RUNS = 100
"""Older records are removed when a new run begins."""
_TAIL_BYTES = 1 << 16
_ENDS = (b'"event": "RunFinished"', b'"event": "RunFailed"')


def records() -> Path:
    """The folder of all records: ``$NBDIST_HOME/runs``, by default below the user's state folder."""
    home = os.environ.get("NBDIST_HOME")
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return (Path(home) if home else Path(state) / "nbdist") / "runs"


def new_run_id() -> str:
    """A name for a run that sorts by time, to a quarter of a millisecond, such as "20261124-093015-4f2a1c"."""
    now_s = time.time()
    second = time.strftime("%Y%m%d-%H%M%S", time.localtime(now_s))
    return f"{second}-{int(now_s % 1 * 4096):03x}{secrets.token_hex(2)[:3]}"


def record_path(run_id: str, rank: int, folder: Path | None = None) -> Path:
    """The path of one rank's record; on rank 0, removes the oldest records beyond `KEPT_RUNS`.

    It removes no record of a run that is still running, nor of another host's run without a recorded end.

    Args:
        run_id: The run.
        rank: The rank.
        folder: The folder of all records, `records()` by default.
    """
    folder = folder or records()
    if rank == 0 and folder.is_dir():  # one rank cleans up for all
        with os.scandir(folder) as entries:  # which knows what each is: a run waits for this
            names = sorted(entry.name for entry in entries if entry.is_dir())
        for name in names[: -KEPT_RUNS or None]:
            if not _goes_on(folder / name):
                shutil.rmtree(folder / name, ignore_errors=True)
    return folder / run_id / f"rank{rank}.jsonl"


def _goes_on(folder: Path) -> bool:
    """Whether the run of a record is still running, as far as this host can see."""
    if any(is_locked(path) for path in folder.glob("rank*.jsonl")):
        return True
    try:
        with (folder / "rank0.jsonl").open("rb") as file:
            first = json.loads(file.readline())
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            last = file.read()
        theirs = first.get("host", host_name()) != host_name()
    except (OSError, ValueError, AttributeError):
        return False
    return theirs and not any(end in last for end in _ENDS)


def cluster_record_path(run_id: str) -> Path:
    """The path of the notebook's record of a run: which ranks were lost and replaced."""
    return records() / run_id / "cluster.jsonl"


def lock(descriptor: int) -> None:
    """Lock an open file (shared), until it is closed or the process dies."""
    with contextlib.suppress(OSError):  # not all file systems have locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def is_locked(path: Path) -> bool:
    """Whether a process on this host is writing the file; False if there is no file."""
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False

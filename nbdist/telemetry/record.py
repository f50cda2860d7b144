"""The record of past runs: one folder a run, one JSON-lines file a rank."""

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

__all__ = ["KEPT_RUNS", "cluster_record_path", "hold", "is_held", "new_run_id", "record_path", "records"]

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
    """Where the record of one rank of a run lies; on rank 0, the oldest records beyond `KEPT_RUNS` are removed.

    Of those that a run which goes on writes none is, nor one of another host's runs that has not told its end.

    Args:
        run_id: Which run.
        rank: Which rank.
        folder: That of all records, `records()` by default.
    """
    folder = folder or records()
    if rank == 0 and folder.is_dir():  # one rank tidies up for all
        for old in sorted(path for path in folder.iterdir() if path.is_dir())[: -KEPT_RUNS or None]:
            if not _goes_on(old):
                shutil.rmtree(old, ignore_errors=True)
    return folder / run_id / f"rank{rank}.jsonl"


def _goes_on(folder: Path) -> bool:
    """Whether the run of a record goes on, as far as this host can tell."""
    if any(is_held(path) for path in folder.glob("rank*.jsonl")):
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
    """Where the record of what happened to the ranks of a run lies: which were lost and replaced."""
    return records() / run_id / "cluster.jsonl"


def hold(descriptor: int) -> None:
    """Mark an open file as being written, until it is closed or the process is gone, however it goes."""
    with contextlib.suppress(OSError):  # not all file systems have locks
        fcntl.flock(descriptor, fcntl.LOCK_SH)


def is_held(path: Path) -> bool:
    """Whether a process on this host is writing the file; none is if it is not there."""
    with contextlib.ExitStack() as opened:
        try:
            file = opened.enter_context(path.open("rb"))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return False

"""Engine: the record of one engine process: rank, pid, host, device, state."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

__all__ = ["Engine", "gone"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The record of one engine.

    Args:
        rank: Its position in the world; -1 for a spare, which has none.
        pid: The process that trains.
        host: Its host's name.
        host_id: Identifies the running system; engines with the same one can share memory.
        device: Its device, such as "cpu" or "cuda:0".
        cores: CPU cores it may use, shared with the other engines of its host.
        born_s: The start time of that process, in seconds since 1970.
        state: "idle", "busy" or "lost".
        stacks: The file for its stack dumps; see `stack_dump`.
    """

    rank: int
    pid: int
    host: str
    host_id: str
    device: str
    cores: int
    born_s: float = 0.0
    state: str = "idle"
    stacks: str = ""


def gone(pid: int, born_s: float) -> bool:
    """Whether a process of this host has ended; its start time tells it from a new process with the same pid."""
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - born_s) > 1.0
    except psutil.NoSuchProcess:
        return True

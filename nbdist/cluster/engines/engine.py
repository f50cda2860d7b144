"""What is known of one engine."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

__all__ = ["Engine", "gone"]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What is known of one engine.

    Args:
        rank: Its position in the world; -1 for a spare, which has none.
        pid: The process that trains.
        host: Its host's name.
        host_id: Names its running system; engines that share it share memory.
        device: What it computes on, such as "cpu" or "cuda:0".
        cores: CPU cores it may use, shared with the other engines of its host.
        born_s: When that process began, in seconds since 1970.
        state: "idle", "busy" or "lost".
        stacks: The file in which it says where it stands, when it is asked; see `stacks`.
        main_thread: The thread that trains.
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
    main_thread: int = 0


def gone(pid: int, born_s: float) -> bool:
    """Whether a process of this host has ended, though its number may be another one's by now."""
    try:
        process = psutil.Process(pid)
        return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - born_s) > 1.0
    except psutil.NoSuchProcess:
        return True

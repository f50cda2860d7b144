"""Engine: the record of one engine process: rank, pid, host, device, state."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Engine"]


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
        mark: Tells that process from others that get its pid, see `process_mark`.
        state: "idle", "busy" or "lost".
        stacks: The file for its stack dumps; see `stack_dump`.
    """

    rank: int
    pid: int
    host: str
    host_id: str
    device: str
    cores: int
    mark: str = ""
    state: str = "idle"
    stacks: str = ""

"""The log of commands to a run: the notebook appends to it in the ranks' store, rank 0 reads it there."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from nbdist.core.comm.rendezvous import as_peer_lost
from nbdist.core.control.commands import Command, Commands
from nbdist.errors import PeerLostError

__all__ = ["CommandLog"]

_POLL_S = 0.05


class CommandLog(Commands):
    """Commands to one run. They outlive its ranks, since the notebook hosts the store.

    They are lines of one value, and the store appends a line completely or not at all. With a key per command, a writer
    that died after taking a number would leave a hole, and a reader would stop there.

    Args:
        store: The ranks' store, shared by all generations.
        run_id: The run's id.
    """

    def __init__(self, store: Any, run_id: str) -> None:
        self._store = store
        self._name = f"commands/{run_id}"
        self._read = 0
        self._next_s = 0.0

    def append(self, kind: str, value: float | str | None) -> None:
        """Append a command. The notebook's side.

        Raises:
            PeerLostError: The store is gone.
        """
        with as_peer_lost():
            self._store.append(self._name, json.dumps([kind, value]) + "\n")

    def new(self) -> list[Command]:
        """See `Commands`; reads the store at most 20 times a second.

        Raises:
            PeerLostError: The store is gone.
        """
        if time.monotonic() < self._next_s:
            return []
        self._next_s = time.monotonic() + _POLL_S
        commands = []
        with as_peer_lost():
            lines = self._store.get(self._name).splitlines() if self._store.check([self._name]) else []
            for line in lines[self._read :]:
                kind, value = json.loads(line)
                stamped = self._store.check([key := f"{self._name}/{self._read}/step"])
                step = int(self._store.get(key)) if stamped else None
                commands.append(Command(kind, value, step))
                self._read += 1
        return commands

    def unapplied(self) -> list[Command]:
        """Commands without a stamp; none if the store is gone. The notebook's side, after a run has ended."""
        with contextlib.suppress(PeerLostError):
            return [command for command in self.new() if command.step is None]
        return []

    def stamp(self, number: int, step: int) -> None:
        """See `Commands`.

        Raises:
            PeerLostError: The store is gone.
        """
        with as_peer_lost():
            self._store.set(f"{self._name}/{number}/step", str(step))

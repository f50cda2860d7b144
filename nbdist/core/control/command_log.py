"""The log of orders to a run: the notebook writes it into the ranks' store, rank 0 reads it there."""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from nbdist.core.comm.rendezvous import echoes
from nbdist.core.control.commands import Command, Commands
from nbdist.errors import PeerLostError

__all__ = ["CommandLog"]

_POLL_S = 0.05


class CommandLog(Commands):
    """Orders to one run. They outlive the ranks that carry them out, for the notebook hosts the store.

    They are the lines of one value, which the store appends to as a whole or not at all: whoever dies while it gives an
    order leaves no hole, behind which nobody would read on.

    Args:
        store: The ranks' store, that of all generations.
        run_id: Which run.
    """

    def __init__(self, store: Any, run_id: str) -> None:
        self._store = store
        self._name = f"orders/{run_id}"
        self._read = 0
        self._next_s = 0.0

    def give(self, kind: str, value: float | str | None) -> None:
        """Write an order behind the others. The notebook's side.

        Raises:
            PeerLostError: The store is gone.
        """
        with echoes():
            self._store.append(self._name, json.dumps([kind, value]) + "\n")

    def new(self) -> list[Command]:
        """See `Commands`; the store is looked at a few times a second.

        Raises:
            PeerLostError: The store is gone.
        """
        if time.monotonic() < self._next_s:
            return []
        self._next_s = time.monotonic() + _POLL_S
        commands = []
        with echoes():
            lines = self._store.get(self._name).splitlines() if self._store.check([self._name]) else []
            for line in lines[self._read :]:
                kind, value = json.loads(line)
                stamped = self._store.check([key := f"{self._name}/{self._read}/step"])
                step = int(self._store.get(key)) if stamped else None
                commands.append(Command(kind, value, step))
                self._read += 1
        return commands

    def left(self) -> list[Command]:
        """Those that no step has heard; nothing where the store is gone. The notebook's side, once a run has ended."""
        with contextlib.suppress(PeerLostError):
            return [command for command in self.new() if command.step is None]
        return []

    def stamp(self, number: int, step: int) -> None:
        """See `Commands`.

        Raises:
            PeerLostError: The store is gone.
        """
        with echoes():
            self._store.set(f"{self._name}/{number}/step", str(step))

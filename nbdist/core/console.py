"""What a user at rank 0's terminal sees of all ranks."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from nbdist.core.comm.world import World
from nbdist.telemetry import Event, RankState, RunFailed, RunFinished, RunStarted, RunState, Sink, SnapshotSink, fold
from nbdist.telemetry.terminal import TerminalView

__all__ = ["screen"]

_TOLD_EVERY_S = 1.0


def screen(world: World, run_id: str) -> Sink:
    """A sink that draws all ranks on rank 0's standard error; the others tell it once a second. Local, on all ranks."""
    if world.rank == 0:
        return _Screen(world, run_id)
    told = _Told(world.store, run_id)
    return SnapshotSink(world.rank, lambda state: told.write(world.rank, state), _TOLD_EVERY_S, math.inf)


class _Told:
    """The latest of each rank, in the ranks' store; without one, or when it is gone, nothing is told."""

    def __init__(self, store: Any, run_id: str) -> None:
        self._store = store
        self._name = f"screen/{run_id}"

    def write(self, rank: int, state: dict[str, Any]) -> None:
        with self._tolerant():
            if self._store is not None:
                self._store.set(f"{self._name}/{rank}", json.dumps(state))

    def read(self, rank: int) -> RankState | None:
        with self._tolerant():
            if self._store is not None and self._store.check([key := f"{self._name}/{rank}"]):
                return RankState.from_dict(json.loads(self._store.get(key)))
        return None

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        """A picture that cannot be drawn must not end a training; whoever sums with the lost rank will say so."""
        try:
            yield
        except RuntimeError:
            self._store = None


class _Screen(Sink):
    def __init__(self, world: World, run_id: str) -> None:
        self._told = _Told(world.store, run_id)
        self._others = range(1, world.size if world.store is not None else 1)
        self._state = RankState(rank=0)
        self._run: RunState | None = None
        self._view = TerminalView(sys.stderr)
        self._next_s = 0.0

    def emit(self, event: Event) -> None:
        """Take in what rank 0 tells, now and then what the others have told, and draw."""
        self._state = fold(self._state, event)
        if isinstance(event, RunStarted):
            ranks = {rank: RankState(rank=rank) for rank in (0, *self._others)}
            self._run = RunState(title=event.title, plan=event.plan, ranks=ranks)
        run = self._run
        if run is None:
            return
        run.merge(self._state)
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _TOLD_EVERY_S
            for rank in self._others:
                if (state := self._told.read(rank)) is not None:
                    run.merge(state)
        match event:
            case RunFinished():  # at once on all ranks, after the same step
                run.ranks = {
                    rank: replace(state, state=event.state, step=self._state.step) for rank, state in run.ranks.items()
                }
                run.end(event.state)
            case RunFailed():
                run.end("failed", event.error)
        self._view.draw(run)

    def close(self) -> None:
        """Give the terminal back."""
        self._view.close()

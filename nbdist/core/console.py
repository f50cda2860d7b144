"""Live progress of all ranks in rank 0's terminal, under torchrun."""

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
from nbdist.telemetry import Event, RankState, RankStateSink, RunFailed, RunFinished, RunStarted, RunState, Sink, fold
from nbdist.telemetry.terminal import TerminalView

__all__ = ["console_sink"]

_PUBLISH_EVERY_S = 1.0


def console_sink(world: World, run_id: str) -> Sink:
    """A sink: rank 0 draws all ranks on standard error; other ranks publish their state once a second. Local."""
    if world.rank == 0:
        return _ConsoleSink(world, run_id)
    published = _PublishedStates(world.store, run_id)
    return RankStateSink(world.rank, lambda state: published.write(world.rank, state), _PUBLISH_EVERY_S, math.inf)


class _PublishedStates:
    """Each rank's latest state, in the ranks' store; without a store, or when it is gone, nothing is published."""

    def __init__(self, store: Any, run_id: str) -> None:
        self._store = store
        self._name = f"console/{run_id}"

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
        """A failing display must not end a training: a lost peer shows up as an error in the next collective."""
        try:
            yield
        except RuntimeError:
            self._store = None


class _ConsoleSink(Sink):
    def __init__(self, world: World, run_id: str) -> None:
        self._published = _PublishedStates(world.store, run_id)
        self._others = range(1, world.size if world.store is not None else 1)
        self._state = RankState(rank=0)
        self._run: RunState | None = None
        self._view = TerminalView(sys.stderr)
        self._next_s = 0.0

    def emit(self, event: Event) -> None:
        """Fold rank 0's event, once a second merge the other ranks' states, and draw."""
        self._state = fold(self._state, event)
        if isinstance(event, RunStarted):
            ranks = {rank: RankState(rank=rank) for rank in (0, *self._others)}
            self._run = RunState(title=event.title, plan=event.plan, ranks=ranks)
        run = self._run
        if run is None:
            return
        run.merge(self._state)
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _PUBLISH_EVERY_S
            for rank in self._others:
                if (state := self._published.read(rank)) is not None:
                    run.merge(state)
        match event:
            case RunFinished():  # all ranks finish after the same step
                run.ranks = {
                    rank: replace(state, state=event.state, step=self._state.step) for rank, state in run.ranks.items()
                }
                run.end(event.state)
            case RunFailed():
                run.end("failed", event.error)
        self._view.draw(run)

    def close(self) -> None:
        """Restore the terminal."""
        self._view.close()

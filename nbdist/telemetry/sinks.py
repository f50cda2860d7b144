"""Sinks: who receives events."""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from nbdist.telemetry.events import EpochFinished, Evaluating, Event, Noted, Point, Progress, RunFinished, RunStarted
from nbdist.telemetry.loss_curve import joined
from nbdist.telemetry.rank_state import RankState, fold
from nbdist.telemetry.record import hold
from nbdist.telemetry.run_view import epoch_text, mesh_text

__all__ = ["JsonlSink", "ListSink", "Sink", "SnapshotSink", "TextSink"]


class Sink(ABC):
    """Receives the events of one rank."""

    @abstractmethod
    def emit(self, event: Event) -> None:
        """Take in one event."""

    def close(self) -> None:  # noqa: B027 - most sinks hold nothing
        """Let go of what the sink holds."""


class ListSink(Sink):
    """Keeps events in `events`."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        """Append the event."""
        self.events.append(event)


class JsonlSink(Sink):
    """The record: events as lines of JSON in `path`, readable by the owner only.

    Args:
        path: The file; what is in it stays.
        interval_s: Of what is told of progress within so many seconds, one line is made.
    """

    def __init__(self, path: Path, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._next_s = 0.0
        self._held: Progress | None = None
        self._losses: list[Point] = []  # of what is held
        for folder in reversed(path.parents):  # `parents=True` would leave those above readable by all
            if not folder.exists():
                folder.mkdir(exist_ok=True, mode=0o700)
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8")
        hold(self._file.fileno())

    def emit(self, event: Event) -> None:
        """Write one line, at once on disk's doorstep, so that a killed rank leaves its last words."""
        if isinstance(event, Progress):
            self._held = event
            self._losses += event.losses
            if time.monotonic() < self._next_s:
                return
        self._write_held()
        if not isinstance(event, Progress):
            self._write(event)

    def close(self) -> None:
        """Close the file."""
        self._write_held()
        self._file.close()

    def _write_held(self) -> None:
        if self._held is not None:
            self._write(replace(self._held, losses=joined((), self._losses)))
            self._held, self._next_s = None, time.monotonic() + self._interval_s
            self._losses.clear()

    def _write(self, event: Event) -> None:
        self._file.write(json.dumps(event.to_dict()) + "\n")
        self._file.flush()


class SnapshotSink(Sink):
    """The picture: folds events into a `RankState` and hands it to `publish`; what is large in it less often.

    Args:
        rank: Whose events come.
        publish: Called with what `RankState.from_dict` takes.
        interval_s: Least seconds between two that tell of nothing but progress.
        whole_every_s: Seconds between two that are whole; what a user asked for, or has to know, makes one at once.
    """

    def __init__(
        self, rank: int, publish: Callable[[dict[str, Any]], None], interval_s: float = 0.05,
        whole_every_s: float = 1.0,
    ) -> None:  # fmt: skip
        self.state = RankState(rank=rank)
        self._publish = publish
        self._interval_s, self._whole_every_s = interval_s, whole_every_s
        self._next_s = self._next_whole_s = 0.0

    def emit(self, event: Event) -> None:
        """Fold, and publish if it is time."""
        self.state = fold(self.state, event)
        now_s = time.monotonic()
        usual = isinstance(event, (Progress, EpochFinished))
        if usual and now_s < self._next_s:
            return
        whole = now_s >= self._next_whole_s or not (usual or isinstance(event, Evaluating))
        self._next_s = now_s + self._interval_s
        if whole:
            self._next_whole_s = now_s + self._whole_every_s
        self._publish(self.state.to_dict(whole=whole))


class TextSink(Sink):
    """Plain lines for a terminal: one an epoch, and in between one every `interval_s` seconds."""

    def __init__(self, stream: IO[str] | None = None, interval_s: float = 5.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval_s = interval_s
        self._next_s = 0.0
        self._total: int | None = None

    def emit(self, event: Event) -> None:
        """Print what a user wants to know."""
        match event:
            case RunStarted():
                self._total = event.steps_total
                self._next_s = time.monotonic() + self._interval_s
                self._print(
                    f"{event.title} on {mesh_text(event.plan)} ({event.device}, {event.plan['threads']} threads a rank)"
                )
            case Progress() if time.monotonic() >= self._next_s:
                self._next_s = time.monotonic() + self._interval_s
                loss = "" if event.loss is None else f"  loss {event.loss:.4g}"
                total = "" if self._total is None else f"/{self._total}"
                self._print(
                    f"step {event.step}{total}{loss}  {event.samples_per_s:,.0f} samples/s on rank {event.rank}"
                )
            case EpochFinished():
                self._print(epoch_text(event.row))
            case Noted():
                self._print(event.text)
            case RunFinished():
                self._print(event.state)

    def _print(self, line: str) -> None:
        print(f"nbdist: {line}", file=self._stream, flush=True)

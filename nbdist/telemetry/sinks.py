"""Sinks receive events and log them: to JSON lines, to a list, as text, or folded into a rank's state."""

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

from nbdist.telemetry.curves import Curve, joined
from nbdist.telemetry.events import EpochFinished, Evaluating, Event, Noted, Progress, RunFinished, RunStarted
from nbdist.telemetry.rank_state import RankState, fold
from nbdist.telemetry.record import lock
from nbdist.telemetry.run_view import epoch_text, mesh_text

__all__ = ["JsonlSink", "ListSink", "RankStateSink", "Sink", "TextSink"]


class Sink(ABC):
    """Receives the events of one rank."""

    @abstractmethod
    def emit(self, event: Event) -> None:
        """Receive one event."""

    def close(self) -> None:  # noqa: B027 - most sinks hold nothing
        """Release the sink's resources."""


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
        path: The file to append to.
        interval_s: Progress within this many seconds becomes one line.
    """

    def __init__(self, path: Path, interval_s: float = 1.0) -> None:
        self._interval_s = interval_s
        self._next_s = 0.0
        self._held: Progress | None = None
        self._curves: dict[str, Curve] = {}  # of the held events
        for folder in reversed(path.parents):  # `parents=True` would leave the folders above readable by all
            if not folder.exists():
                folder.mkdir(exist_ok=True, mode=0o700)
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8")
        lock(self._file.fileno())

    def emit(self, event: Event) -> None:
        """Write one line and flush it, so that a killed rank's last events are in the file."""
        if isinstance(event, Progress):
            self._held = event
            self._curves = joined(self._curves, event.curves)
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
            self._write(replace(self._held, curves=self._curves))
            self._held, self._next_s = None, time.monotonic() + self._interval_s
            self._curves = {}

    def _write(self, event: Event) -> None:
        self._file.write(json.dumps(event.to_dict()) + "\n")
        self._file.flush()


class RankStateSink(Sink):
    """Folds events into a `RankState` and passes it to `publish`; its large fields less often.

    Args:
        rank: The rank of the events.
        publish: Called with the data for `RankState.from_dict`.
        interval_s: Least seconds between two states after progress alone.
        whole_every_s: Seconds between two whole states; a command or a note publishes a whole one at once.
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
        # A rank that hangs after two steps tells no more, and hangs are looked for from the second step on.
        usual = isinstance(event, (Progress, EpochFinished)) and self.state.step - self.state.first_step > 2
        if usual and now_s < self._next_s:
            return
        whole = now_s >= self._next_whole_s or not (usual or isinstance(event, Evaluating))
        self._next_s = now_s + self._interval_s
        if whole:
            self._next_whole_s = now_s + self._whole_every_s
        self._publish(self.state.to_dict(whole=whole))


class TextSink(Sink):
    """Log lines for a terminal: one an epoch, and in between one every `interval_s` seconds."""

    def __init__(self, stream: IO[str] | None = None, interval_s: float = 5.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval_s = interval_s
        self._next_s = 0.0
        self._total: int | None = None

    def emit(self, event: Event) -> None:
        """Print a line for the event, if it is due."""
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

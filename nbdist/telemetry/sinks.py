"""Sinks: who receives events."""

from __future__ import annotations

import json
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from nbdist.telemetry.events import EpochFinished, Event, Noted, Progress, RunFinished, RunStarted
from nbdist.telemetry.state import RankState, fold
from nbdist.telemetry.view import epoch_text, mesh_text

__all__ = ["JsonlSink", "ListSink", "Sink", "SnapshotSink", "TextSink"]

_CURVE_EVERY_S = 1.0


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
    """The record: every event as one line of JSON in `path`, readable by the owner only."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8")

    def emit(self, event: Event) -> None:
        """Write one line, at once on disk's doorstep, so that a killed rank leaves its last words."""
        self._file.write(json.dumps(event.to_dict()) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SnapshotSink(Sink):
    """The picture: folds events into a `RankState` and hands it to `publish`; its curve, the largest part, less often.

    Args:
        rank: Whose events come.
        publish: Called with what `RankState.from_dict` takes, after each event.
        curve_every_s: Seconds between two that hold the curve.
    """

    def __init__(
        self, rank: int, publish: Callable[[dict[str, Any]], None], curve_every_s: float = _CURVE_EVERY_S
    ) -> None:
        self.state = RankState(rank=rank)
        self._publish = publish
        self._every_s = curve_every_s
        self._next_s = 0.0

    def emit(self, event: Event) -> None:
        """Fold and publish. Events are few: progress is metered where it arises."""
        self.state = fold(self.state, event)
        data = self.state.to_dict()
        if (now := time.monotonic()) >= self._next_s:
            self._next_s = now + self._every_s
        else:
            data["curve"] = None
        self._publish(data)


class TextSink(Sink):
    """Plain lines for a terminal: one an epoch, and in between one every `interval_s` seconds."""

    def __init__(self, stream: IO[str] | None = None, interval_s: float = 5.0) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._interval_s = interval_s
        self._next_s = 0.0
        self._total: int | None = None

    def emit(self, event: Event) -> None:
        """Print what a person wants to know."""
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

"""WHAT happened: events, the fold of events into state, and sinks. Standard library only."""

from nbdist.telemetry.events import (
    EpochFinished,
    Evaluating,
    Event,
    Noted,
    Progress,
    Recovered,
    RunFailed,
    RunFinished,
    RunStarted,
    Work,
    Worked,
)
from nbdist.telemetry.meter import Meter
from nbdist.telemetry.sinks import JsonlSink, ListSink, Sink, SnapshotSink, TextSink
from nbdist.telemetry.state import RankState, RunState, fold
from nbdist.telemetry.timeline import Timeline
from nbdist.telemetry.view import run_html, run_text

__all__ = [
    "EpochFinished",
    "Evaluating",
    "Event",
    "JsonlSink",
    "ListSink",
    "Meter",
    "Noted",
    "Progress",
    "RankState",
    "Recovered",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "RunState",
    "Sink",
    "SnapshotSink",
    "TextSink",
    "Timeline",
    "Work",
    "Worked",
    "fold",
    "run_html",
    "run_text",
]

"""WHAT happened: events, the fold of events into state, and sinks. Standard library only."""

from nbdist.telemetry.curve import Losses
from nbdist.telemetry.events import (
    Checkpointed,
    EpochFinished,
    Evaluating,
    Event,
    Noted,
    Ordered,
    Point,
    Progress,
    Recovered,
    RunFailed,
    RunFinished,
    RunStarted,
    Shares,
    Work,
    Worked,
)
from nbdist.telemetry.meter import Meter
from nbdist.telemetry.past import PastRun, past_run, past_runs
from nbdist.telemetry.report import Report
from nbdist.telemetry.run_state import RunState
from nbdist.telemetry.sinks import JsonlSink, ListSink, Sink, SnapshotSink, TextSink
from nbdist.telemetry.state import Happening, RankState, fold
from nbdist.telemetry.timeline import Timeline
from nbdist.telemetry.view import run_html, run_text

__all__ = [
    "Checkpointed",
    "EpochFinished",
    "Evaluating",
    "Event",
    "Happening",
    "JsonlSink",
    "ListSink",
    "Losses",
    "Meter",
    "Noted",
    "Ordered",
    "PastRun",
    "Point",
    "Progress",
    "RankState",
    "Recovered",
    "Report",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "RunState",
    "Shares",
    "Sink",
    "SnapshotSink",
    "TextSink",
    "Timeline",
    "Work",
    "Worked",
    "fold",
    "past_run",
    "past_runs",
    "run_html",
    "run_text",
]

"""WHAT happened in a run: events, their fold into state, sinks, views. Standard library only."""

from nbdist.telemetry.comparison import Comparison, compare
from nbdist.telemetry.curves import Curves
from nbdist.telemetry.events import (
    Checkpointed,
    CommandApplied,
    EpochFinished,
    Evaluating,
    Event,
    Noted,
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
from nbdist.telemetry.rank_state import Happening, RankState, fold
from nbdist.telemetry.record_reader import PastRun, past_run, past_runs
from nbdist.telemetry.report import Report
from nbdist.telemetry.run_state import RunState
from nbdist.telemetry.run_view import run_html, run_text
from nbdist.telemetry.sinks import JsonlSink, ListSink, RankStateSink, Sink, TextSink
from nbdist.telemetry.timeline import Timeline

__all__ = [
    "Checkpointed",
    "CommandApplied",
    "Comparison",
    "Curves",
    "EpochFinished",
    "Evaluating",
    "Event",
    "Happening",
    "JsonlSink",
    "ListSink",
    "Meter",
    "Noted",
    "PastRun",
    "Point",
    "Progress",
    "RankState",
    "RankStateSink",
    "Recovered",
    "Report",
    "RunFailed",
    "RunFinished",
    "RunStarted",
    "RunState",
    "Shares",
    "Sink",
    "TextSink",
    "Timeline",
    "Work",
    "Worked",
    "compare",
    "fold",
    "past_run",
    "past_runs",
    "run_html",
    "run_text",
]

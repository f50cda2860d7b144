"""Sinks: the record, the rank state, the text; and the meter, which says when progress is due."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import stat

import pytest
from sample_events import PROGRESS, ROW, STARTED

from nbdist.telemetry import (
    EpochFinished,
    JsonlSink,
    ListSink,
    Meter,
    Noted,
    Point,
    RankState,
    RankStateSink,
    RunFinished,
    TextSink,
)

EVENTS = [
    STARTED, PROGRESS, EpochFinished(rank=1, row=ROW), Noted(rank=1, text="so"), RunFinished(rank=1, state="finished"),
]  # fmt: skip


def emit(sink):
    for event in EVENTS:
        sink.emit(event)
    return sink


@pytest.mark.parametrize("umask", [0o022, 0o000])
def test_a_record_is_for_its_owner(tmp_path, umask):
    """Folder and file are closed to others under any umask; each event is one line, written at once."""
    path = tmp_path / "new" / "run" / "rank1.jsonl"
    before = os.umask(umask)
    try:
        sink = emit(JsonlSink(path))
    finally:
        os.umask(before)
    assert json.loads(json.dumps([event.to_dict() for event in EVENTS])) == [
        json.loads(line) for line in path.read_text().splitlines()
    ]
    assert (0o600, 0o700) == (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode))
    sink.close()


def test_a_record_is_added_to(tmp_path):
    """A second sink on the same file appends to the first."""
    for _ in range(2):
        emit(JsonlSink(tmp_path / "r.jsonl")).close()
    assert 2 * len(EVENTS) == len((tmp_path / "r.jsonl").read_text().splitlines())


def test_a_snapshot_is_published_when_it_is_time():
    """It publishes the state so far, as plain data; progress alone is limited in rate, other events are not."""
    for interval_s, reported in ((0.0, 5), (3600.0, 3)):
        published = []
        sink = emit(RankStateSink(1, published.append, interval_s))
        assert [*["running"] * (reported - 1), "finished"] == [state["state"] for state in published]
        assert sink.state.to_dict() == published[-1]
        assert json.loads(json.dumps(published[-1]))["step"] == PROGRESS.step


def test_progress_within_a_second_is_one_line(tmp_path):
    """The newest counts, and the losses of all; an event of another kind comes after earlier ones."""
    reported = [
        dataclasses.replace(PROGRESS, step=s, curves={"loss": (Point(s, 1, 0.5, 0.5, 0.5),)}) for s in (8, 9, 10)
    ]
    sink = JsonlSink(tmp_path / "r.jsonl", 3600.0)
    for event in (*reported, Noted(rank=1, text="so"), reported[0]):
        sink.emit(event)
    sink.close()
    lines = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert [8, 10, None, 8] == [line.get("step") for line in lines]
    assert [[8], [9, 10], [], [8]] == [[point[0] for point in line.get("curves", {}).get("loss", [])] for line in lines]


def test_what_is_large_is_published_less_often():
    """The curve is most of a state; a reader keeps it in between, until the rank begins again."""
    reported = [dataclasses.replace(PROGRESS, curves={"loss": (Point(step, 1, 0.5, 0.5, 0.5),)}) for step in (9, 10)]
    for every_s, sizes in ((3600.0, [1, 0]), (0.0, [1, 2])):
        published = []
        sink = RankStateSink(1, published.append, 0.0, every_s)
        for event in reported:
            sink.emit(event)
        assert sizes == [len(state.get("curves", {}).get("loss", ())) for state in published]
    first, last = RankState.from_dict(published[0]), sink.state.to_dict(whole=False)
    assert first.curves == RankState.from_dict(last, first).curves
    assert {} == RankState.from_dict({**last, "first_step": 5}, first).curves


def test_a_list_keeps_events():
    """In order."""
    assert emit(ListSink()).events == EVENTS


def test_text_tells_what_a_person_wants_to_know():
    """Title and device, progress at most once an interval, each epoch, and the end."""
    often, seldom = (io.StringIO() for _ in range(2))
    emit(TextSink(often, interval_s=0.0))
    emit(TextSink(seldom, interval_s=1e6))
    lines = often.getvalue().splitlines()
    assert [
        "nbdist: Net on dp=2 (cpu, 3 threads a rank)",
        "nbdist: step 10/20  loss 0.4  80 samples/s on rank 1",
        "nbdist: epoch 1  loss 0.5  val_loss 0.6  160 samples/s  2.0 s",
        "nbdist: so",
        "nbdist: finished",
    ] == lines
    assert [lines[0], *lines[2:]] == seldom.getvalue().splitlines()


def test_text_goes_to_standard_error(capsys):
    """So that a script's standard output stays its own."""
    TextSink().emit(RunFinished(rank=0, state="stopped"))
    assert ("", "nbdist: stopped\n") == capsys.readouterr()


def test_a_meter_says_when_and_how_fast():
    """It is due at first, then after each interval; speed counts from the previous report."""
    seldom, always = Meter(interval_s=1e6), Meter(interval_s=0.0)
    assert seldom.due()
    assert seldom.read(100, 10)[0] > 0
    assert not seldom.due()
    assert 0 == seldom.read(100, 10)[0]
    always.read(5, 1)
    assert always.due()

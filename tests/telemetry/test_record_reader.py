"""Past runs: the record holds what the panel showed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from gate import Gate
from sample_events import PROGRESS, ROW, STARTED
from shared_cluster import until
from torch import nn

import nbdist
from nbdist.errors import EngineError, PlanError
from nbdist.telemetry import EpochFinished, JsonlSink, Point, RunFinished, past_run, past_runs
from nbdist.telemetry.record import record_path

DATA = torch.ones(64, 6), torch.zeros(64, dtype=torch.long)
OPTIONS = {"loss": "cross_entropy", "batch_size": 16}


def reported(run_id, *events, rank=0):
    """A record of events."""
    sink = JsonlSink(record_path(run_id, rank))
    for event in events:
        sink.emit(event)
    sink.close()


def test_a_run_is_read_back_as_it_was(cluster):
    """State, history, curve, ranks and happenings."""
    run = cluster.train(nn.Linear(6, 3), DATA, epochs=3, val=DATA, metric="accuracy", **OPTIONS)
    past = past_run(run.run_id)
    assert (run.state, run.history, run.stages) == (past.state, past.history, past.stages)
    assert run.progress.title == past.progress.title
    assert json.loads(json.dumps(run.progress.plan)) == past.progress.plan
    assert (12, [0, 1]) == (past.progress.step, sorted(past.progress.ranks))
    assert 12 == past.progress.curve[-1].step
    assert past.overview.history[-1] == run.history[-1]
    assert repr(past).splitlines()[0].startswith("nbdist: Linear (21 parameters) on dp=2 · finished · step 12/12")


def test_a_run_that_lost_a_rank_is_reported_once(cluster, tmp_path):
    """Repeated steps are not on the curve twice, and the lost rank is among the happenings."""
    gate = Gate(tmp_path, 20)
    run = cluster.train(nn.Linear(6, 3), DATA, steps=10**9, background=True, lr_scheduler=gate, **OPTIONS)
    gate.wait(20, run=run)
    os.kill(cluster.engines[1].pid, signal.SIGKILL)
    gate.open(20)
    until(lambda: run.progress.notes)
    resumed = run.progress.step
    until(lambda: run.progress.step >= resumed + 20)
    run.stop()
    run.wait()
    past = past_run(run.run_id).progress
    steps = [point.step for point in past.curve]
    assert sorted(set(steps)) == steps
    assert run.progress.notes == past.notes
    assert ["recovered", "command"] == [happening.kind for happening in past.happenings]
    assert ("stopped", run.progress.step) == (past.state, past.ranks[0].step)  # the spare's home is another test's


def test_a_run_that_failed_says_why(cluster):
    """The error of the rank that failed first."""

    def torn(output, target):
        raise ValueError("torn on purpose")

    with pytest.raises(EngineError):
        cluster.train(nn.Linear(6, 3), DATA, loss=torn)
    past = past_run(nbdist.last_run().run_id)
    assert ("failed", "rank 0: ValueError: torn on purpose") == (past.state, past.progress.error)


def test_the_newest_come_first():
    """At most the requested number; a run that never began is left out."""
    for number in range(4):
        reported(f"2026112{number}-000000-abcd", STARTED, RunFinished(rank=0, state="finished"))
    reported("20261129-000000-abcd")
    assert ["20261123-000000-abcd", "20261122-000000-abcd"] == [run.run_id for run in past_runs(2)]
    assert 4 == len(past_runs())
    assert past_runs(0) == []


def test_without_a_record_there_are_none(home):
    """The folder need not even be there."""
    assert past_runs() == []


def test_the_beginning_of_a_name_will_do():
    """If only one run has it."""
    for name in ("20261121-000000-abcd", "20261121-000000-abff", "20261122-000000-abcd"):
        reported(name, STARTED)
    assert past_run("20261122").run_id == "20261122-000000-abcd"
    with pytest.raises(PlanError, match="2 runs begin with '20261121'"):
        past_run("20261121")
    with pytest.raises(PlanError, match=r"no record of a run '20261121-000000-abcc': .* Did you mean '20261121"):
        past_run("20261121-000000-abcc")


def test_a_torn_line_is_passed_over():
    """A killed rank's torn line, and kinds of events of a later version."""
    reported("20261121-000000-abcd", STARTED, EpochFinished(rank=0, row=ROW))
    with record_path("20261121-000000-abcd", 1).with_name("rank0.jsonl").open("a") as file:
        file.write('{"event": "Improved", "rank": 0}\n{"event": "Progre')
    past = past_run("20261121")
    assert ([ROW], [ROW]) == (past.history, list(past.overview.history))


def test_a_list_reads_the_ends_only():
    """For a record of any length: its middle is not read."""
    run_id = "20261121-000000-abcd"
    reported(run_id, STARTED)
    path = record_path(run_id, 1).with_name("rank0.jsonl")
    with path.open("ab") as file:
        file.truncate(1 << 33)
        file.write(b"\n")
    reported(run_id, EpochFinished(rank=0, row=ROW), RunFinished(rank=0, state="stopped"))
    overview = past_run(run_id).overview
    assert ("stopped", [ROW]) == (overview.state, list(overview.history))


WRITER = """
import sys
from sample_events import STARTED
from nbdist.telemetry import JsonlSink
from nbdist.telemetry.record import record_path
sink = JsonlSink(record_path("20261121-000000-abcd", 0))
sink.emit(STARTED)
print("ready", flush=True)
sys.stdin.read()
"""


def test_a_run_is_lost_when_its_processes_are_gone(monkeypatch):
    """Until then it is running, for every reader."""
    monkeypatch.setenv("NBDIST_HOST", STARTED.host)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])},
    )  # fmt: skip
    try:
        assert writer.stdout.readline() == "ready\n"
        assert past_run("20261121").state == "running"
    finally:
        writer.kill()
        writer.communicate()
    past = past_run("20261121")
    assert past.state == "lost"
    assert "died without recording an end" in repr(past)


def test_a_run_of_another_host_is_as_it_last_reported(monkeypatch):
    """Only its own host can see whether its processes are gone."""
    monkeypatch.setenv("NBDIST_HOST", STARTED.host)
    reported("20261121-000000-abcd", STARTED)
    assert "lost" == past_run("20261121").state
    monkeypatch.setenv("NBDIST_HOST", "another")
    assert "running" == past_run("20261121").state
    reported("20261121-000000-abcd", RunFinished(rank=0, state="finished"))
    assert "finished" == past_run("20261121").state


def test_losses_keep_their_points():
    """Rank 0's losses are the curve, and what steps log curves beside it."""
    points = (Point(1, 1, 2.0, 2.0, 2.0), Point(2, 1, 1.5, 1.5, 1.5))
    curves = {"loss": points, "kl": points[1:]}
    reported("20261121-000000-abcd", STARTED, type(PROGRESS)(**{**vars(PROGRESS), "rank": 0, "curves": curves}))
    assert curves == past_run("20261121").progress.curves


def test_a_record_of_another_version_has_its_curve():
    """Before there were several curves, progress held the losses alone."""
    reported("20261121-000000-abcd", STARTED, PROGRESS)
    path = past_run("20261121").path / "rank0.jsonl"
    first, *_ = path.read_text().splitlines()
    line = {"event": "Progress", "rank": 0, "time_s": 1.0, "step": 1, "epoch": 1, "samples": 4, "loss": 2.0}
    line |= {"samples_per_s": 1.0, "memory_mib": 1.0, "losses": [[1, 1, 2.0, 2.0, 2.0]]}
    path.write_text(f"{first}\n{json.dumps(line)}\n")
    assert (Point(1, 1, 2.0, 2.0, 2.0),) == past_run("20261121").progress.curve

"""Hang detection: a hung run is diagnosed, and then recovers or ends."""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import re
import signal
import time
import types
from pathlib import Path

import pytest
import torch
from shared_cluster import until
from tasks import classes, copied, same
from torch import nn

from nbdist.errors import EngineError
from nbdist.telemetry.record import records

pytestmark = pytest.mark.engines

HERE = re.escape(os.path.abspath(__file__))


class Net(nn.Module):
    """On rank 1 its 40th forward hangs, unless the file `mark` is there: in Python, in C, or stopped by a signal."""

    def __init__(self, mark="", how="", width=16):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(6, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 3)
            )
        self.mark, self.how, self.calls = mark, how, 0

    def forward(self, x):
        self.calls += self.training
        if self.how and self.calls == 40 and os.environ.get("RANK") == "1" and not os.path.exists(self.mark):
            Path(self.mark).touch()
            if self.how == "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            while self.how == "in C":
                ctypes.PyDLL(None).sleep(1000)  # holds the GIL
            time.sleep(1000)
        return self.layers(x)


OPTIONS = {"loss": "cross_entropy", "batch_size": 16, "epochs": 20, "threads": 1, "check": "no"}
LINES, FIRST = inspect.getsourcelines(Net)


def line_of(words):
    return FIRST + next(i for i, line in enumerate(LINES) if words in line)


IN_PYTHON = f"rank 1 is at {HERE}, line {line_of('time.sleep')}, in forward"
VERDICTS = {
    "in Python": IN_PYTHON,
    "in C": f"rank 1 is at {HERE}, line {line_of('PyDLL')}, in forward",
    "stopped": r"rank 1 does nothing, for its process is stopped \(SIGSTOP\)",
}


class Clock:
    """The one by which hangs are measured: it stands still until the test lets time pass."""

    def __init__(self):
        self.now_s, self.looks = 0.0, 0

    def monotonic(self):
        self.looks += 1
        return self.now_s


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("nbdist.cluster.diagnose.hangs.time", types.SimpleNamespace(monotonic=clock.monotonic))
    return clock


def hung(cluster, run, clock, pattern):
    """Wait until the ranks stand as they will for ever, and let time pass until that is noticed.

    More than once: the ranks' last words may be later than they stood still, and the time counts from then.
    """

    def noticed():
        return run.ended or run.progress.notes

    while not noticed():
        until(lambda: noticed() or re.match(pattern, cluster.where().verdict))
        clock.now_s, looks = clock.now_s + 1.0, clock.looks
        until(lambda looks=looks: noticed() or clock.looks > looks + 3)
    return run


def train(cluster, model, **options):
    return cluster.train(model, classes(), background=True, **OPTIONS, **options)


def rows(run):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in run.history]


@pytest.fixture(scope="module", autouse=True)
def replaced(shared_cluster):
    """Engines that took others' places were born in the surroundings of another test: they end with this module."""
    yield
    shared_cluster.stop()


@pytest.fixture(scope="module")
def undisturbed(shared_cluster):
    """The weights and the history of an undisturbed run."""
    model = Net()
    run = train(shared_cluster.ready(), model)
    run.wait()
    return copied(model), rows(run)


@pytest.mark.parametrize("how", VERDICTS)
def test_a_rank_that_hangs_is_replaced_and_no_bit_changes(cluster, undisturbed, clock, tmp_path, how):
    """In Python, in C with the GIL held, or stopped; the run's notes and record name the line."""
    model, pids = Net(str(tmp_path / "hung"), how), [engine.pid for engine in cluster.engines]
    run = train(cluster, model, hang_timeout=0.5)
    hung(cluster, run, clock, f"{VERDICTS[how]}; rank 0 waits for it in ").wait()
    assert "finished" == run.state
    assert same(model, undisturbed[0])
    assert undisturbed[1] == rows(run)
    assert [False, True] == [engine.pid != pid for engine, pid in zip(cluster.engines, pids, strict=True)]
    pattern = f"no step for 0.5 s: {VERDICTS[how]}; rank 0 waits for it in "
    explained, recovered = run.progress.notes
    assert re.match(pattern, explained)
    assert re.match(rf"rank 1 lost \({pattern}.*\), replaced in .* s; all continue from step \d+", recovered)
    events = [json.loads(line) for line in (records() / run.run_id / "cluster.jsonl").read_text().splitlines()]
    assert [explained, recovered] == [event["text"] for event in events if event["event"] == "Noted"]


def test_with_shared_weights_the_rank_that_hangs_is_found_too(cluster, clock, tmp_path):
    """Above 100,000 parameters both ranks map the same weights, and wait for each other in other calls."""
    undisturbed, model = Net(width=12_000), Net(str(tmp_path / "hung"), "in Python", width=12_000)
    train(cluster, undisturbed).wait()
    run = train(cluster, model, hang_timeout=0.5)
    hung(cluster, run, clock, f"{IN_PYTHON}; rank 0 waits for it in ").wait()
    assert "finished" == run.state
    assert same(model, copied(undisturbed))


def test_on_hang_stop_ends_the_run_and_keeps_its_state(cluster, undisturbed, clock, tmp_path):
    """The error names the rank and line; `resume` continues without changing a bit."""
    model = Net(str(tmp_path / "hung"), "in Python")
    run = train(cluster, model, hang_timeout=0.5, on_hang="stop")
    pattern = f"{IN_PYTHON}; rank 0 waits for it in "
    with pytest.raises(EngineError, match=f"no step for 0.5 s: {pattern}") as failed:
        hung(cluster, run, clock, pattern).wait()
    assert "The model holds the weights after step" in str(failed.value)
    again = cluster.resume()
    assert "finished" == again.state
    assert same(model, undisturbed[0])
    assert undisturbed[1] == rows(again)


def test_a_hang_of_all_ranks_ends_the_run(cluster, clock):
    """All are in the same function: replacing them all would not help."""

    def loss(output, target):
        import time

        time.sleep(1000)

    run = cluster.train(Net(), classes(), background=True, **{**OPTIONS, "loss": loss}, hang_timeout=0.5)
    pattern = r"no rank waits for another; rank 0 is at .*, in loss, rank 1 is at .*, in loss"
    with pytest.raises(EngineError, match=f"no step for 0.5 s: {pattern}"):
        hung(cluster, run, clock, pattern).wait()


def test_a_paused_run_does_not_hang(cluster, clock):
    """However long the pause."""
    run = cluster.train(Net(), classes(), background=True, **{**OPTIONS, "epochs": 10**6}, hang_timeout=0.5)
    run.pause()
    until(lambda: run.state == "paused")
    step, looks = run.progress.step, clock.looks
    clock.now_s += 1000.0
    until(lambda: clock.looks > looks + 3)
    run.resume()
    until(lambda: run.progress.step > step)
    run.stop()
    assert "stopped" == run.wait().state
    assert [] == run.progress.notes


class Differ(nn.Module):
    """In the third forward, as soon as hangs are looked for, rank 1 waits in a barrier, rank 0 in its gradient sync."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(6, 3), 0

    def forward(self, x):
        import torch.distributed as dist

        self.calls += self.training
        if self.calls == 3 and os.environ.get("RANK") == "1":
            dist.barrier()
        return self.layer(x)


def passes(run, clock, seconds):
    """Let time pass until it is noticed."""
    clock.now_s, looks = clock.now_s + seconds, clock.looks
    until(lambda: run.ended or clock.looks > looks + 3)


def test_without_a_timeout_ranks_that_wait_for_each_other_end_the_run(cluster, clock):
    """The sentence says in which collectives; the weights are kept."""
    run = train(cluster, Differ())
    pattern = r"the ranks are in different collectives, .*: rank 0 in \w+.*, rank 1 in barrier"
    while not run.ended:
        until(lambda: run.ended or re.match(pattern, cluster.where().verdict))
        passes(run, clock, 70.0)
    with pytest.raises(EngineError, match=rf"no step for \d+ s: {pattern}") as failed:
        run.wait()
    assert "The model holds the weights after step" in str(failed.value)


def test_without_a_timeout_a_rank_in_the_middle_of_something_is_only_noted(cluster, clock, tmp_path):
    """It may be loading data: the user decides."""
    run = train(cluster, Net(str(tmp_path / "hung"), "in Python"))
    pattern = f"{IN_PYTHON}; rank 0 waits for it in "
    while not run.progress.notes:
        until(lambda: re.match(pattern, cluster.where().verdict))
        passes(run, clock, 70.0)
    assert re.match(rf"no step for \d+ s: {pattern}", *run.progress.notes)
    passes(run, clock, 1000.0)
    assert not run.ended
    run.stop(now=True)
    assert "stopped" == run.wait().state

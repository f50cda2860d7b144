"""The run queue and the Run under races: each thread is held at the critical point."""

from __future__ import annotations

import collections
import contextlib
import sys
import threading
import time
import warnings

import pytest
from gate import NotedLock
from shared_cluster import ENGINES, HUNG_S, until
from tasks import classes, net

from nbdist.cluster.engines import engines as engines_module
from nbdist.cluster.runs.run_queue import RunQueue
from nbdist.errors import ClusterError

pytestmark = pytest.mark.engines

LONG = 10**9
SHORT = {"loss": "cross_entropy", "steps": 1, "batch_size": 16, "threads": 1, "check": "mesh", "background": True}


class Gate:
    """A point at which a thread is held until the test opens it."""

    def __init__(self):
        self.came, self.opened = threading.Event(), threading.Event()

    def hold(self):
        self.came.set()
        assert self.opened.wait(HUNG_S), "nobody has opened the gate"


@pytest.fixture
def gate():
    gate = Gate()
    yield gate
    gate.opened.set()


@pytest.fixture
def meet(cluster, monkeypatch, gate):
    """``meet(one, other)``: call `one` up to the gate, `other` to its end or the queue's lock, then let both end."""
    lock = NotedLock(cluster._run_queue._queueing)
    monkeypatch.setattr(cluster._run_queue, "_queueing", lock)

    def call(*functions):
        first, second = (threading.Thread(target=function) for function in functions)
        first.start()
        assert gate.came.wait(HUNG_S)
        second.start()
        until(lambda: lock.waited_for.is_set() or not second.is_alive())
        gate.opened.set()
        first.join()
        second.join()

    return call


def held(folder):
    """A loss that waits in its first step for a file, and the path of that file."""
    started, go_file = folder / "started", folder / "goes on"

    def loss(output, target):
        started.touch()
        while not go_file.exists():
            time.sleep(0.005)
        return output.square().mean()

    return loss, started, go_file


@pytest.fixture
def second_held(cluster, monkeypatch, gate, tmp_path):
    """Three runs: the first has ended, the second, endless, is held during its start, the third waits."""
    start, runs = RunQueue._start, []

    def held_start(self, queued):
        if len(runs) > 1 and queued.run is runs[1]:
            gate.hold()
        start(self, queued)

    monkeypatch.setattr(RunQueue, "_start", held_start)
    loss, started, go_file = held(tmp_path)
    runs.append(cluster.train(net(), classes(), **{**SHORT, "loss": loss}))
    until(started.exists)
    runs += [cluster.train(net(), classes(), **{**SHORT, "steps": steps}) for steps in (LONG, 1)]
    go_file.touch()
    assert gate.came.wait(HUNG_S)
    return runs


def test_a_stop_that_comes_with_the_end_comes_before_it_or_after(cluster, monkeypatch, gate, tmp_path):
    """An ended run does not stay in state stopping."""
    command = RunQueue._give_command

    def held_command(self, run, kind, value):
        gate.hold()
        command(self, run, kind, value)

    monkeypatch.setattr(RunQueue, "_give_command", held_command)
    loss, started, go_file = held(tmp_path)
    run = cluster.train(net(), classes(), **{**SHORT, "loss": loss})
    until(started.exists)
    stopping = threading.Thread(target=run.stop)
    stopping.start()
    assert gate.came.wait(HUNG_S)
    go_file.touch()
    until(lambda: run.ended or monitor_waits())
    gate.opened.set()
    stopping.join()
    run.wait()
    assert ("finished", None) == (run.state, cluster.current_run)


def monitor_waits():
    """Whether the monitor waits while a command is being given."""
    threads = [thread for thread in threading.enumerate() if thread.name == "nbdist-monitor"]
    frames = [sys._current_frames().get(thread.ident) for thread in threads]
    return any(frame is not None and frame.f_code.co_name in ("_merge", "_end") for frame in frames)


def test_a_starting_run_is_the_current_one(cluster, second_held, gate):
    """No other run may start meanwhile, and those behind it wait."""
    _, second, third = second_held
    assert (second, [third]) == (cluster.current_run, cluster.queued)
    third.stop()
    with pytest.raises(ClusterError, match=f"run {second.run_id} is running"):
        cluster.check_ready()
    late = cluster.train(net(), classes(), **SHORT)
    assert [late] == cluster.queued
    second.stop()
    gate.opened.set()
    assert ["stopped", "finished"] == [run.wait().state for run in (second, late)]


def test_the_engines_may_be_stopped_while_a_run_starts(cluster, second_held, gate):
    """`stop` does not wait for the start; the run fails, and the others never start."""
    _, second, third = second_held
    cluster.stop()
    assert ("stopped", ["the engines were stopped before it could start"]) == (third.state, third.progress.notes)
    gate.opened.set()
    with pytest.raises(ClusterError):
        second.wait()


def test_a_stop_command_counts_while_the_run_starts(cluster, second_held, gate):
    """It ends after its first step."""
    _, second, third = second_held
    second.stop()
    gate.opened.set()
    assert ["stopped", "finished"] == [run.wait().state for run in (second, third)]
    assert 1 == second.progress.step


def test_a_failing_watch_blocks_no_run(cluster, monkeypatch, tmp_path):
    """A queued run that is stopped, or cannot start, has ended, and those behind it start."""
    start, runs = RunQueue._start, []

    def failing(self, queued):
        if len(runs) > 2 and queued.run is runs[2]:
            raise OSError("not today")
        start(self, queued)

    def watch(run):
        raise ZeroDivisionError

    monkeypatch.setattr(RunQueue, "_start", failing)
    loss, started, go_file = held(tmp_path)
    runs.append(cluster.train(net(), classes(), **{**SHORT, "loss": loss}))
    until(started.exists)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        runs += [cluster.train(net(), classes(), watch=watch, **SHORT) for _ in range(2)]
        runs.append(cluster.train(net(), classes(), **SHORT))
        runs[1].stop()
        assert ("stopped", True) == (runs[1].state, runs[1].ended)
        go_file.touch()
        with pytest.raises(ClusterError, match="not today"):
            runs[2].wait()
    assert "finished" == runs[3].wait().state


def test_any_error_at_the_start_ends_a_run(cluster, monkeypatch, tmp_path):
    """`wait` returns, and those behind it start."""
    start, runs = RunQueue._start, []

    def failing(self, queued):
        if len(runs) > 1 and queued.run is runs[1]:
            raise OSError("not today")
        start(self, queued)

    monkeypatch.setattr(RunQueue, "_start", failing)
    loss, started, go_file = held(tmp_path)
    runs.append(cluster.train(net(), classes(), **{**SHORT, "loss": loss}))
    until(started.exists)
    runs += [cluster.train(net(), classes(), **SHORT) for _ in range(2)]
    go_file.touch()
    with pytest.raises(ClusterError, match=r"the run could not start: OSError\('not today'\)"):
        runs[1].wait(60)
    assert "finished" == runs[2].wait(60).state


@pytest.fixture
def scaled(cluster):
    """The running cluster, which has its two engines again afterwards."""
    yield cluster
    if cluster.size != ENGINES:
        cluster.scale(ENGINES)


def test_engines_are_listed_while_some_leave(scaled, monkeypatch):
    """All of them, or those that stay, at any moment of the change."""
    replace, seen, looking = engines_module.replace, [], []

    def probed(record, **changes):
        if not looking:
            looking.append(True)
            with contextlib.suppress(ClusterError):
                seen.append(len(scaled.engines))
            looking.clear()
        return replace(record, **changes)

    monkeypatch.setattr(engines_module, "replace", probed)
    scaled.scale(1)
    monkeypatch.undo()
    assert {1, 2} >= set(seen)
    assert seen


def test_of_two_numbers_of_engines_before_a_step_ends_the_last_one_counts(scaled, tmp_path):
    """The run continues on that number, and both commands are in its record."""
    loss, started, go_file = held(tmp_path)
    run = scaled.train(net(), classes(), **{**SHORT, "loss": loss, "steps": 10**9})
    until(started.exists)
    scaled.scale(1)
    scaled.scale(3)
    go_file.touch()
    until(lambda: "running" == run.state and len(run.progress.ranks) == 3)
    until(lambda: [h for h in run.progress.happenings if h.kind == "recovered"])
    scaled_to = [h.text.partition(" after")[0] for h in run.progress.happenings if h.kind == "command"]
    run.stop()
    run.wait()
    assert (["scaled to 1", "scaled to 3"], "stopped", 3) == (scaled_to, run.state, scaled.size)
    assert ["3 instead of 2 engines"] == [note.partition(";")[0] for note in run.progress.notes]


def test_a_stop_while_a_run_leaves_the_queue(cluster, tmp_path):
    """Neither waits for the other: the one has the run's lock, the other the queue's."""
    loss, started, go_file = held(tmp_path)
    first = cluster.train(net(), classes(), **{**SHORT, "loss": loss})
    until(started.exists)
    second = cluster.train(net(), classes(), **{**SHORT, "steps": LONG})
    emptied = threading.Event()
    threading.Thread(target=lambda: (until(lambda: not cluster.queued), emptied.set()), daemon=True).start()
    with second.control.changing:
        go_file.touch()
        assert emptied.wait(HUNG_S)
        second.stop()
    assert ["finished", "stopped"] == [run.wait().state for run in (first, second)]


def test_of_two_runs_that_are_added_at_once_one_starts(cluster, monkeypatch, gate, meet):
    """The other one is queued, though no run was there when the first one looked."""
    look, looked = RunQueue._is_busy, []

    def held_look(self):
        busy = look(self)
        looked.append(busy)
        if len(looked) == 1:
            gate.hold()
        return busy

    def add():
        runs.append(cluster.train(net(), classes(), **{**SHORT, "steps": LONG}))

    runs = []
    monkeypatch.setattr(RunQueue, "_is_busy", held_look)
    meet(add, add)
    assert [False, True] == looked
    assert [cluster.current_run, *cluster.queued] in (runs, runs[::-1])
    for run in reversed(runs):
        run.stop()
        run.wait()


class HeldDeque(collections.deque):
    """Holds its first reader at a gate, in the middle."""

    gate = None

    def __iter__(self):
        items, gate, self.gate = super().__iter__(), self.gate, None
        if gate is not None:
            gate.hold()
        return items


def test_the_queue_is_read_while_it_changes(cluster, monkeypatch, gate, meet, tmp_path):
    """The reader gets all that waited; the run that leaves waits for it."""
    waiting, seen = HeldDeque(), []
    monkeypatch.setattr(cluster._run_queue, "_waiting", waiting)
    loss, started, go_file = held(tmp_path)
    runs = [cluster.train(net(), classes(), **{**SHORT, "loss": loss}) for _ in range(3)]
    until(started.exists)
    waiting.gate = gate
    meet(lambda: seen.append(cluster.queued), runs[1].stop)
    go_file.touch()
    assert [runs[1:]] == seen
    assert ["finished", "stopped", "finished"] == [run.wait().state for run in runs]

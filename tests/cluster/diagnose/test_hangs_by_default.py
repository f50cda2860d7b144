"""Hang detection without `hang_timeout`: when the stacks are read, and what they must say for the run to end."""

from __future__ import annotations

import os
import traceback
import types

import pytest

from nbdist.cluster.diagnose.hangs import Hangs
from nbdist.cluster.diagnose.where import RankWhere, Where
from nbdist.telemetry import RankState, RunState


def frame(file="cell.py", name="forward"):
    return traceback.FrameSummary(file, 3, name, lookup_line=False)


def at(state, collective="", **more):
    return {"state": state, "collective": collective, "frames": (frame(),)} | more


IN_ONE = [at("waiting", "all_reduce"), at("waiting", "all_reduce")]
IN_TWO = [at("waiting", "barrier"), at("waiting", "all_reduce")]
FOR_IDLE = [at("waiting", "barrier"), at("idle")]
LATE = [at("waiting", "barrier"), at("working")]


class Watched:
    """A run of two ranks, its clock and what its stacks would say."""

    def __init__(self, monkeypatch, stacks=IN_TWO, on_hang="replace", timeout_s=None):
        self.now_s, self.reads, self.stacks = 0.0, 0, stacks
        self.progress = RunState(title="", plan={}, ranks={}, state="running")
        monkeypatch.setattr("nbdist.cluster.diagnose.hangs.time", types.SimpleNamespace(monotonic=lambda: self.now_s))
        self.hangs = Hangs(timeout_s, on_hang, self.where)
        self.step(0)

    def where(self):
        self.reads += 1
        return Where(ranks=tuple(RankWhere(rank=rank, **stack) for rank, stack in enumerate(self.stacks)))

    def step(self, step, state="running", first_step=0):
        """All ranks reach a step, or a state."""
        for rank in range(2):
            self.progress.ranks[rank] = RankState(rank=rank, step=step, first_step=first_step, state=state)
        return self.hangs.found(self.progress)

    def after(self, seconds):
        self.now_s += seconds
        return self.hangs.found(self.progress)


@pytest.fixture
def watched(monkeypatch):
    def make(*args, steps=2, **more):
        made = Watched(monkeypatch, *args, **more)
        for step in range(1, steps + 1):
            made.step(step)
        return made

    return make


@pytest.mark.parametrize("stacks", [IN_ONE, IN_TWO, FOR_IDLE])
def test_ranks_that_wait_for_each_other_hang_once_two_dumps_say_so(watched, stacks):
    """After a minute without a step, and five seconds more; the sentence says who waits where."""
    run = watched(stacks)
    assert [None, 0] == [run.after(59.9), run.reads]
    assert [None, 1] == [run.after(0.1), run.reads]
    assert [None, 1] == [run.after(4.9), run.reads]
    hang = run.after(0.1)
    assert (True, f"no step for 65 s: {run.where().verdict}") == (hang.certain, hang.text)
    assert ([1] if stacks is FOR_IDLE else []) == hang.culprits


def test_the_slowest_step_counts_twenty_times(watched):
    """The first one does not: it compiles, or loads."""
    run = watched(steps=0)
    run.after(1000.0)
    run.step(1)
    run.now_s += 30.0
    run.step(2)
    run.step(3)
    assert [None, 0] == [run.after(599.0), run.reads]
    run.after(1.0)
    assert run.after(5.0).certain


@pytest.mark.parametrize("steps", [0, 1])
def test_before_the_second_step_nothing_hangs(watched, steps):
    """A compiler or a download may take minutes."""
    run = watched(steps=steps)
    assert [None, None, 0] == [run.after(1e4), run.after(1e4), run.reads]


def test_after_a_recovery_the_steps_count_anew(watched):
    """Ranks that have resumed compile again."""
    run = watched(steps=9)
    run.step(9, first_step=8)
    assert [None, 0] == [run.after(1e4), run.reads]


@pytest.mark.parametrize("state", ["evaluating", "paused", "starting"])
def test_a_rank_that_evaluates_or_is_paused_does_not_hang(watched, state):
    """However long; the time begins with the next step."""
    run = watched()
    run.step(2, state)
    assert [None, 0] == [run.after(1e4), run.reads]
    run.step(2)
    assert [None, 0] == [run.after(59.0), run.reads]


@pytest.mark.parametrize("name", ["pdb", "bdb", "nbdist/core/state/checkpoint_writer", "nbdist/core/state/snapshotter"])
def test_a_debugger_or_a_checkpoint_is_no_hang(watched, name):
    """Though the other ranks wait; there is no note either."""
    path = os.path.join(os.sep, "lib", *f"{name}.py".split("/"))
    run = watched([at("waiting", "barrier"), at("waiting", "barrier", frames=(frame(path),))])
    assert [None] * 4 == [run.after(60.0) for _ in range(4)]
    assert run.reads == 4


@pytest.mark.parametrize("state", ["working", "stopped", "silent", "elsewhere"])
def test_a_rank_in_the_middle_of_something_is_noted_and_left_alone(watched, state):
    """A slow step, loading of data, a stopped process, another host: a note, once, until there is a step again."""
    run = watched([at("waiting", "barrier"), at(state)])
    hang = run.after(60.0)
    assert (False, [], f"no step for 60 s: {run.where().verdict}") == (hang.certain, hang.culprits, hang.text)
    assert [None] * 3 == [run.after(60.0) for _ in range(3)]
    run.step(3)
    assert not run.after(20 * 240.0).certain


def test_ranks_of_which_none_waits_for_another_are_noted(watched):
    """All load data, perhaps; the sentence says where."""
    run = watched([at("working"), at("working")])
    hang = run.after(60.0)
    assert (False, [], f"no step for 60 s: {run.where().verdict}") == (hang.certain, hang.culprits, hang.text)


def test_stacks_that_change_meanwhile_are_no_hang(watched):
    """The ranks were slow, and go on."""
    run = watched(IN_TWO)
    run.after(60.0)
    run.stacks = IN_ONE
    assert run.after(5.0) is None
    run.stacks = LATE
    assert not run.after(5.0).certain


def test_no_limit(watched):
    """With an infinite timeout."""
    run = watched(timeout_s=float("inf"))
    assert [None, 0] == [run.after(1e9), run.reads]

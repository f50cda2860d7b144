"""States of ranks, merged into the state of a run."""

from __future__ import annotations

import dataclasses
import statistics
from random import Random

import pytest
from sample_events import FAST, ROW, SLOW, run_of

from nbdist.telemetry import Happening, Point, RankState, Shares


def noted(rank, *texts, kind="note"):
    return dataclasses.replace(rank, happenings=tuple(Happening(float(i), kind, t) for i, t in enumerate(texts)))


def test_what_is_noted_by_several_ranks_is_shown_once():
    """In order of arrival, however often the state of the same rank is merged."""
    run = run_of(noted(FAST, "one"), noted(SLOW, "one", "two"))
    run.merge(noted(FAST, "one", "three"))
    run.merge(noted(SLOW, "one", "two"))
    assert ["one", "two", "three"] == run.notes


def test_commands_happen_once_and_are_no_notes():
    """Every rank reports them; rank 0's report counts."""
    run = run_of(noted(FAST, "paused", kind="command"), noted(SLOW, "paused", "late", kind="command"))
    assert ["paused"] == [happening.text for happening in run.happenings]
    assert [] == run.notes


@pytest.mark.parametrize("before", ["starting", "recovering", "running"])
def test_a_run_is_paused_while_rank_0_says_so(before):
    """Another rank may report it later."""
    run = run_of(FAST, SLOW)
    run.state = before
    for rank, state in (
        (dataclasses.replace(FAST, state="paused"), "paused"), (SLOW, "paused"), (FAST, "running"),
        (dataclasses.replace(SLOW, state="paused"), "running"),
    ):  # fmt: skip
        run.merge(rank)
        assert state == run.state


def test_the_loss_so_far_stays_where_ranks_begin_again():
    """Up to the step from which they resume; after it, the new losses."""
    points = [Point(step, 1, loss, loss, loss) for step, loss in [(1, 4.0), (2, 3.0), (3, 2.0)]]
    run = run_of(dataclasses.replace(FAST, curves={"loss": tuple(points)}), SLOW)
    run.restart_ranks()
    again = Point(3, 1, 2.5, 2.5, 2.5)
    run.merge(dataclasses.replace(FAST, first_step=2, step=3, curves={"loss": (again,)}))
    assert (*points[:2], again) == run.curve


def standing(*busy_and_idle, state="running"):
    ranks = [
        dataclasses.replace(FAST, rank=i, busy_s=busy, shares=Shares(1 - idle, 0.0, 0.0, idle))
        for i, (busy, idle) in enumerate(busy_and_idle)
    ]
    run = run_of(*ranks)
    run.state = state
    return [*run.standings.values()]


@pytest.mark.parametrize(
    ("ranks", "stand"),
    [
        ([(0.1, 0.0), (0.1, 0.1)], ["running", "running"]),
        ([(0.2, 0.0), (0.1, 0.4)], ["slow", "running"]),
        ([(0.1, 0.6), (0.2, 0.0), (0.1, 0.6)], ["waiting", "slow", "waiting"]),
        ([(0.0004, 0.0), (0.0002, 0.2)], ["running", "running"]),
        ([(0.1, 0.0)], ["running"]),
    ],
)
def test_a_rank_stands_beside_the_others(ranks, stand):
    """A rank is slow if its step takes much longer than the others', waiting if it mostly waits for them."""
    assert stand == standing(*ranks)


@pytest.mark.parametrize("count", range(2, 9))
def test_slow_is_beside_the_median_of_the_others(count):
    """Of any number of ranks, some of which have not measured a step yet, and some the same time."""
    random = Random(count)
    for _ in range(20):
        busy = [random.choice([0.0, 0.1, 0.12, 0.15, 0.2]) for _ in range(count)]
        for own, found in zip(range(count), standing(*((each, 0.0) for each in busy)), strict=True):
            others = [each for rank, each in enumerate(busy) if rank != own and each]
            slow = bool(others) and busy[own] > 1.3 * statistics.median(others)
            assert found == ("slow" if slow else "running")


def test_states_that_come_together_are_merged_in_their_order():
    one, other = run_of(FAST, dataclasses.replace(FAST, rank=1)), run_of(FAST, dataclasses.replace(FAST, rank=1))
    states = [dataclasses.replace(FAST, rank=rank, step=step) for step in (5, 6) for rank in (0, 1)]
    for state in states:
        one.merge(state)
    other.merge(*states)
    assert one.ranks == other.ranks
    assert 6 == one.step == other.step


def test_who_runs_while_others_are_replaced_waits():
    """However its time was split before."""
    assert ["waiting", "waiting"] == standing((0.2, 0.0), (0.1, 0.0), state="recovering")


def test_the_end_is_foreseen_from_the_speed(monkeypatch):
    """Of the last minute; unknown at first, after the end, and where the data has no length."""
    now = [100.0]
    monkeypatch.setattr("nbdist.telemetry.run_state.time.monotonic", lambda: now[0])
    run = run_of(FAST, dataclasses.replace(SLOW, step=0))
    assert run.eta_s is None
    now[0] = 110.0
    run.merge(dataclasses.replace(SLOW, step=5))
    assert pytest.approx(30.0) == run.eta_s
    assert 0.0 == run.stalled_s
    now[0] = 114.0
    assert pytest.approx(26.0) == run.eta_s
    assert 4.0 == run.stalled_s
    run.merge(dataclasses.replace(FAST, steps_total=None))
    assert run.eta_s is None
    run.end("finished")
    assert (None, 0.0) == (run.eta_s, run.stalled_s)


def test_a_step_of_any_rank_is_progress(monkeypatch):
    """Of many ranks each is seen once in a while: the last one may have no step yet."""
    now = [100.0]
    monkeypatch.setattr("nbdist.telemetry.run_state.time.monotonic", lambda: now[0])
    run = run_of(FAST, dataclasses.replace(SLOW, step=0))
    now[0] = 109.0
    assert 9.0 == run.stalled_s
    run.merge(dataclasses.replace(FAST, step=FAST.step + 1))
    assert (0, 0.0) == (run.step, run.stalled_s)


def test_a_run_that_recovers_runs_again():
    """With the first state of a running rank; after a resume, an older step counts."""
    run = run_of(FAST, SLOW)
    run.state = "recovering"
    assert run.running
    run.merge(dataclasses.replace(SLOW, state="starting"))
    assert "recovering" == run.state
    run.merge(dataclasses.replace(SLOW, step=5))
    assert ("running", 5) == (run.state, run.step)


def test_it_stands_where_it_came_home():
    """Though ranks had begun later steps."""
    run = run_of(FAST, SLOW)
    run.set_step(9)
    assert [9, 9] == [rank.step for rank in run.ranks.values()]


def test_a_run_adds_its_ranks_up():
    """The step that all have done, samples and speed of all together, the mean of their losses."""
    run = run_of(FAST, SLOW)
    assert ("running", 11, 20, 190) == (run.state, run.step, run.steps_total, run.samples)
    assert (50.0, pytest.approx(0.3)) == (run.samples_per_s, run.loss)


def test_a_loss_nobody_has_yet_is_none():
    """And a loss of a single rank is that rank's."""
    nothing = [dataclasses.replace(rank, loss=None) for rank in (FAST, SLOW)]
    assert run_of(*nothing).loss is None
    assert 0.4 == run_of(nothing[0], SLOW).loss


def test_an_ended_run_shows_the_exact_numbers():
    """The last row's loss, the mean speed of the training, and a stopped clock."""
    second = {**ROW, "epoch": 2, "loss": 0.25, "samples": 320, "seconds": 6.0}
    run = run_of(dataclasses.replace(FAST, history=(ROW, second)), SLOW)
    assert run.running
    run.end("finished")
    assert (False, 0.25, 80.0) == (run.running, run.loss, run.samples_per_s)
    assert (ROW, second) == run.history
    assert run.elapsed_s == run.elapsed_s
    assert run.elapsed_s == run.ended_s - run.started_s


@pytest.mark.parametrize("state", ["finished", "stopped", "failed"])
def test_an_end_is_final(state):
    """A late state updates its rank and does not revive the run."""
    run = run_of(FAST, SLOW)
    run.end(state, "why")
    run.merge(dataclasses.replace(SLOW, step=12))
    assert (state, "why", False, 12) == (run.state, run.error, run.running, run.step)


def test_a_run_starts_with_its_first_snapshot():
    """A rank without events is starting."""
    run = run_of(RankState(rank=0), RankState(rank=1))
    assert "starting" == run.state
    run.merge(FAST)
    assert "running" == run.state

"""Events folded into the state of a rank, and ranks into the state of a run."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from told import FAST, PROGRESS, ROW, SLOW, STARTED, run_of

from nbdist.telemetry import (
    EpochFinished,
    Evaluating,
    Event,
    Noted,
    RankState,
    Recovered,
    RunFailed,
    RunFinished,
    Work,
    Worked,
    fold,
)

WORKED = Worked(rank=1, step=9, work=(Work("forward", 1, 0, 5.0, 5.5), Work("backward", 1, 0, 5.5, 6.5)))


def folded(*events):
    state = RankState(rank=1)
    for event in events:
        state = fold(state, event)
    return state


@pytest.mark.parametrize(
    ("events", "changed"),
    [
        ([], {}),
        ([STARTED], {"state": "running", "steps_total": 20, "host": "h", "pid": 7, "device": "cpu"}),
        ([PROGRESS], {"state": "running", "step": 10, "epoch": 1, "samples": 160, "loss": 0.4, "samples_per_s": 80.0,
                      "memory_mib": 300.0}),
        ([dataclasses.replace(WORKED, step=8), WORKED], {"work": WORKED}),
        ([Evaluating(rank=1)], {"state": "evaluating"}),
        ([Evaluating(rank=1), EpochFinished(rank=1, row=ROW)], {"state": "running", "history": (ROW,)}),
        ([EpochFinished(rank=1, row=ROW)] * 2, {"state": "running", "history": (ROW, ROW)}),
        ([Noted(rank=1, text="one"), Noted(rank=1, text="two")], {"notes": ("one", "two")}),
        ([PROGRESS, EpochFinished(rank=1, row=ROW), dataclasses.replace(STARTED, step=7, history=[ROW])],
         {"state": "running", "step": 7, "epoch": 1, "samples": 160, "loss": 0.4, "samples_per_s": 80.0,
          "memory_mib": 300.0, "history": (ROW,), "steps_total": 20, "host": "h", "pid": 7, "device": "cpu"}),
        ([Recovered(rank=1, step=3, seconds=0.5)], {}),
        ([RunFinished(rank=1, state="stopped")], {"state": "stopped"}),
        ([RunFailed(rank=1, error="E: x")], {"state": "failed", "error": "E: x"}),
    ],
)  # fmt: skip
def test_an_event_changes_what_it_tells_and_nothing_else(events, changed):
    """Folding is pure: the state before is what it was."""
    assert dataclasses.replace(RankState(rank=1), **changed) == folded(*events)
    assert RankState(rank=1) == folded()


def test_a_step_without_a_loss_keeps_the_last_one():
    """A rank that had no part in a short batch still shows the loss it had."""
    assert 0.4 == folded(PROGRESS, dataclasses.replace(PROGRESS, step=11, loss=None)).loss


def test_states_and_events_go_through_json():
    """A snapshot comes back as it was; an event says its kind and the time."""
    state = folded(STARTED, PROGRESS, WORKED, EpochFinished(rank=1, row=ROW), Noted(rank=1, text="so"))
    assert state == RankState.from_dict(json.loads(json.dumps(state.to_dict())))
    before = time.time()
    data = json.loads(json.dumps(EpochFinished(rank=1, row=ROW).to_dict()))
    assert (data["event"], data["rank"], data["row"]) == ("EpochFinished", 1, ROW)
    assert before <= data["time_s"] <= time.time()


def test_what_is_noted_by_several_ranks_is_said_once():
    """In the order in which it came, however often a snapshot of the same rank comes."""
    run = run_of(dataclasses.replace(FAST, notes=("one",)), dataclasses.replace(SLOW, notes=("one", "two")))
    run.merge(dataclasses.replace(FAST, notes=("one", "three")))
    run.merge(dataclasses.replace(SLOW, notes=("one", "two")))
    assert ["one", "two", "three"] == run.notes


def test_a_run_that_recovers_runs_again():
    """With the first snapshot of a rank that runs; where it goes on, an older step counts."""
    run = run_of(FAST, SLOW)
    run.state = "recovering"
    assert run.running
    run.merge(dataclasses.replace(SLOW, state="starting"))
    assert "recovering" == run.state
    run.merge(dataclasses.replace(SLOW, step=5))
    assert ("running", 5) == (run.state, run.step)


def test_it_stands_where_it_came_home():
    """Whatever step ranks had begun after that."""
    run = run_of(FAST, SLOW)
    run.stand_at(9)
    assert [9, 9] == [rank.step for rank in run.ranks.values()]


@pytest.mark.parametrize("kind", Event.__subclasses__())
def test_events_are_frozen(kind):
    """A fact does not change."""
    assert kind.__dataclass_params__.frozen


def test_a_run_adds_its_ranks_up():
    """The step that all have done, samples and speed of all together, the mean of their losses."""
    run = run_of(FAST, SLOW)
    assert ("running", 11, 20, 190) == (run.state, run.step, run.steps_total, run.samples)
    assert (50.0, pytest.approx(0.3)) == (run.samples_per_s, run.loss)


def test_a_loss_nobody_has_yet_is_none():
    """And one that a single rank has is that rank's."""
    nothing = [dataclasses.replace(rank, loss=None) for rank in (FAST, SLOW)]
    assert run_of(*nothing).loss is None
    assert 0.4 == run_of(nothing[0], SLOW).loss


def test_an_ended_run_shows_the_exact_numbers():
    """The last row's loss, the mean speed of the training, and a clock that stands."""
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
    """A snapshot that comes late updates its rank and does not bring the run back."""
    run = run_of(FAST, SLOW)
    run.end(state, "why")
    run.merge(dataclasses.replace(SLOW, step=12))
    assert (state, "why", False, 12) == (run.state, run.error, run.running, run.step)


def test_a_run_starts_with_its_first_snapshot():
    """Until a rank has something to say it is starting."""
    run = run_of(RankState(rank=0), RankState(rank=1))
    assert "starting" == run.state
    run.merge(FAST)
    assert "running" == run.state

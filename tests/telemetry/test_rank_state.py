"""Events folded into the state of a rank."""

from __future__ import annotations

import dataclasses
import json
import time

import pytest
from sample_events import PROGRESS, ROW, STARTED

from nbdist.telemetry import (
    Checkpointed,
    CommandApplied,
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

PAUSED = CommandApplied(rank=1, time_s=3.0, command="pause", value=None, step=10)
PROGRESSED = {"state": "running", "step": 10, "epoch": 1, "samples": 160, "loss": 0.4, "samples_per_s": 80.0,
              "memory_mib": 300.0}  # fmt: skip


def folded(*events):
    state = RankState(rank=1)
    for event in events:
        state = fold(state, event)
    return state


@pytest.mark.parametrize(
    ("events", "changed"),
    [
        ([], {}),
        ([STARTED], {"state": "running", "steps_total": 20, "host": "h", "pid": 7, "device": "cpu",
                     "place": {"dp": 1}}),
        ([PROGRESS], PROGRESSED),
        ([dataclasses.replace(WORKED, step=8), WORKED], {"work": WORKED}),
        ([Evaluating(rank=1)], {"state": "evaluating"}),
        ([Evaluating(rank=1), EpochFinished(rank=1, row=ROW)], {"state": "running", "history": (ROW,)}),
        ([EpochFinished(rank=1, row=ROW)] * 2, {"state": "running", "history": (ROW, ROW)}),
        ([Noted(rank=1, text="one", time_s=1.0), Noted(rank=1, text="two", time_s=2.0)],
         {"happenings": ((1.0, "note", "one", 0), (2.0, "note", "two", 0))}),
        ([PAUSED], {"state": "paused", "step": 10, "happenings": ((3.0, "command", "paused after step 10", 0),)}),
        ([PAUSED, PROGRESS],
         {**PROGRESSED, "state": "paused", "happenings": ((3.0, "command", "paused after step 10", 0),)}),
        ([Checkpointed(rank=1, time_s=4.0, step=1000, path="ck", seconds=0.5)],
         {"happenings": ((4.0, "checkpoint", "checkpoint of step 1,000 in ck", 0),)}),
        ([Checkpointed(rank=1, time_s=4.0, step=1, path="/home/me/checkpoints/run/step1", seconds=0.5)],
         {"happenings": ((4.0, "checkpoint", "checkpoint of step 1 in …/checkpoints/run/step1", 0),)}),
        ([CommandApplied(rank=1, time_s=4.0, command="lr", value=0.25, step=7, number=2)],
         {"lr": 0.25, "step": 7, "happenings": ((4.0, "command", "learning rate 0.25 after step 7", 2),)}),
        ([PROGRESS, EpochFinished(rank=1, row=ROW), dataclasses.replace(STARTED, step=7, history=[ROW])],
         {"state": "running", "step": 7, "epoch": 1, "samples": 160, "loss": 0.4, "samples_per_s": 80.0,
          "memory_mib": 300.0, "history": (ROW,), "steps_total": 20, "host": "h", "pid": 7, "device": "cpu",
          "place": {"dp": 1}, "first_step": 7}),
        ([Recovered(rank=1, step=3, seconds=0.5)], {}),
        ([RunFinished(rank=1, state="stopped")], {"state": "stopped"}),
        ([RunFailed(rank=1, error="E: x")], {"state": "failed", "error": "E: x"}),
    ],
)  # fmt: skip
def test_an_event_changes_what_it_tells_and_nothing_else(events, changed):
    """Folding is pure: the old state is unchanged."""
    assert dataclasses.replace(RankState(rank=1), **changed) == folded(*events)
    assert RankState(rank=1) == folded()


def test_a_step_without_a_loss_keeps_the_last_one():
    """A rank without a part of a short batch keeps its last loss."""
    assert 0.4 == folded(PROGRESS, dataclasses.replace(PROGRESS, step=11, loss=None)).loss


def test_states_and_events_go_through_json():
    """A state survives the round trip; an event has its kind and the time."""
    state = folded(STARTED, PROGRESS, WORKED, EpochFinished(rank=1, row=ROW), Noted(rank=1, text="so"))
    assert state == RankState.from_dict(json.loads(json.dumps(state.to_dict())))
    before = time.time()
    data = json.loads(json.dumps(EpochFinished(rank=1, row=ROW).to_dict()))
    assert (data["event"], data["rank"], data["row"]) == ("EpochFinished", 1, ROW)
    assert before <= data["time_s"] <= time.time()


@pytest.mark.parametrize("kind", Event.__subclasses__())
def test_events_are_frozen(kind):
    """An event is frozen."""
    assert kind.__dataclass_params__.frozen

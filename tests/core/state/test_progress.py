"""The position: what a rank knows of where it stands, through JSON and back."""

from __future__ import annotations

import json

import pytest
import torch
from problems import classes, mlp, train

from nbdist.core.comm.world import World
from nbdist.core.state.progress import Row, TrainProgress
from nbdist.plan import Plan

CPU = torch.device("cpu")


def somewhere():
    """In the middle of the second epoch."""
    at = TrainProgress(CPU)
    for epoch in (1, 2):
        for _ in range(3):
            at.advance(8, [(torch.tensor(0.1), 5.0), (torch.tensor(0.7), torch.tensor(3.0))])
        if epoch == 1:
            at.next_epoch({"epoch": 1, "loss": 0.5})
    return at


def without_seconds(state_dict):
    return {**state_dict, "row": {key: value for key, value in state_dict["row"].items() if key != "seconds"}}


def test_it_goes_through_json():
    """To the last bit of the sums."""
    at = somewhere()
    again = TrainProgress.of(json.loads(json.dumps(at.state_dict())), CPU)
    assert without_seconds(at.state_dict()) == without_seconds(again.state_dict())
    assert at.moment == again.moment
    assert at.row.loss.sums.tolist() == again.row.loss.sums.tolist()


def test_what_was_told_is_not_what_goes_on():
    """A position made of a telling leaves it as it is."""
    state_dict = json.loads(json.dumps(somewhere().state_dict()))
    before = json.dumps(state_dict)
    again = TrainProgress.of(state_dict, CPU)
    again.advance(8, [(torch.tensor(1.0), 1.0)])
    again.next_epoch({"epoch": 2})
    assert before == json.dumps(state_dict)


def test_counts_go_on():
    """Steps, batches, samples, and the sums of the row."""
    at = TrainProgress.of(somewhere().state_dict(), CPU)
    at.advance(4, [(torch.tensor(2.0), 4.0)])
    assert (2, 4, 7, 52) == (at.epoch, at.batch, at.step, at.samples)
    assert (4, 28) == (at.row.steps, at.row.samples)
    assert pytest.approx(3 * (0.1 * 5 + 0.7 * 3) + 8) == at.row.loss.sums.tolist()[0]


def test_seconds_go_on():
    """From where they were, not from when it was told."""
    row = Row(CPU, {"steps": 1, "samples": 2, "loss": [1.0, 2.0], "seconds": 100.0})
    assert 100 <= row.seconds < 110
    assert 0 <= Row(CPU).seconds < 10


def test_each_change_is_another_moment():
    """So that no two states of a training are taken for each other, the end of an epoch with no step in it included."""
    at, moments = TrainProgress(CPU), []
    moments.append(at.moment)
    for change in (
        lambda: at.advance(1, []), lambda: at.next_epoch({"epoch": 1}), lambda: at.advance(1, []),
        lambda: at.next_epoch(None), lambda: at.close({"epoch": 2}), lambda: at.advance(1, []),
    ):  # fmt: skip
        change()
        moments.append(at.moment)
    assert sorted(set(moments)) == moments


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({"epochs": 1}, [], False),
        ({"epochs": 1}, ["step"], False),
        ({"epochs": 1}, ["step", "epoch"], True),
        ({"epochs": 2}, ["step", "epoch"], False),
        ({"epochs": 2}, ["step", "epoch", "step", "epoch"], True),
        ({"steps": 2}, ["step"], False),
        ({"steps": 2}, ["step", "step"], False),  # its row is not complete
        ({"steps": 2}, ["step", "wrap", "step"], False),
        ({"steps": 2}, ["step", "step", "close"], True),
        ({"steps": 3}, ["step", "step", "close"], False),
        ({"steps": 2}, ["step", "step", "step", "close"], True),
    ],
)
def test_what_is_complete(options, changes, expected):
    """All steps or epochs, and the last row."""
    at = TrainProgress(CPU)
    for change in changes:
        if change == "step":
            at.advance(1, [])
        elif change == "close":
            at.close({"epoch": 1})
        else:
            at.next_epoch({"epoch": 1} if change == "epoch" else None)
    assert expected == at.complete(Plan.create(ranks=1, cores=1, **options))


def rows_of(world):
    result, _ = train(world, mlp(), classes(40), optimizer="sgd", batch_size=16, epochs=2)
    return [{**row, "seconds": 0} for row in result.history]


def test_a_row_is_the_same_on_all_ranks(run_ranks):
    """And counts what all have read."""
    first, second = run_ranks(2, rows_of)
    assert first == second
    expected, _ = train(World(), mlp(), classes(40), optimizer="sgd", batch_size=16, epochs=2, accumulate=2)
    assert [{**row, "seconds": 0} for row in expected.history] == first

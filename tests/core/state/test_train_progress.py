"""Train progress: a rank's epoch, step, counts and history, through JSON and back."""

from __future__ import annotations

import json
import types

import pytest
import torch
from problems import classes, mlp, stop_after, train

from nbdist.core.comm.world import World
from nbdist.core.state.train_progress import Row, TrainProgress
from nbdist.plan import Plan

CPU = torch.device("cpu")


def somewhere():
    """In the middle of the second epoch."""
    progress = TrainProgress(CPU)
    for epoch in (1, 2):
        for _ in range(3):
            progress.advance(8, [(torch.tensor(0.1), 5.0), (torch.tensor(0.7), torch.tensor(3.0))])
        if epoch == 1:
            progress.next_epoch({"epoch": 1, "loss": 0.5})
    return progress


def without_seconds(state_dict):
    return {**state_dict, "row": {key: value for key, value in state_dict["row"].items() if key != "seconds"}}


def test_it_goes_through_json():
    """To the last bit of the sums."""
    progress = somewhere()
    loaded = TrainProgress.from_state_dict(json.loads(json.dumps(progress.state_dict())), CPU)
    assert without_seconds(progress.state_dict()) == without_seconds(loaded.state_dict())
    assert progress.moment == loaded.moment
    assert progress.row.loss.sums.tolist() == loaded.row.loss.sums.tolist()


def test_loaded_progress_does_not_share_its_state_dict():
    """Advancing it leaves the state dict unchanged."""
    state_dict = json.loads(json.dumps(somewhere().state_dict()))
    before = json.dumps(state_dict)
    loaded = TrainProgress.from_state_dict(state_dict, CPU)
    loaded.advance(8, [(torch.tensor(1.0), 1.0)])
    loaded.next_epoch({"epoch": 2})
    assert before == json.dumps(state_dict)


def test_counts_continue():
    """Steps, batches, samples, and the sums of the row."""
    progress = TrainProgress.from_state_dict(somewhere().state_dict(), CPU)
    progress.advance(4, [(torch.tensor(2.0), 4.0)])
    assert (2, 4, 7, 52) == (progress.epoch, progress.batch, progress.step, progress.samples)
    assert (4, 28) == (progress.row.steps, progress.row.samples)
    assert pytest.approx(3 * (0.1 * 5 + 0.7 * 3) + 8) == progress.row.loss.sums.tolist()[0]


def test_seconds_continue(monkeypatch):
    """From the saved seconds; time between saving and loading does not count."""
    clock = types.SimpleNamespace(perf_counter=iter([10.0, 12.5, 20.0, 24.0]).__next__)
    monkeypatch.setattr("nbdist.core.state.train_progress.time", clock)
    assert 102.5 == Row(CPU, {"steps": 1, "samples": 2, "loss": [1.0, 2.0], "seconds": 100.0}).seconds
    assert 4.0 == Row(CPU).seconds


def test_each_change_is_another_moment():
    """So that no two states of a training are confused, even at the end of an epoch without a step."""
    progress, moments = TrainProgress(CPU), []
    moments.append(progress.moment)
    for change in (
        lambda: progress.advance(1, []), lambda: progress.next_epoch({"epoch": 1}), lambda: progress.advance(1, []),
        lambda: progress.next_epoch(None), lambda: progress.close({"epoch": 2}), lambda: progress.advance(1, []),
    ):  # fmt: skip
        change()
        moments.append(progress.moment)
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
    progress = TrainProgress(CPU)
    for change in changes:
        if change == "step":
            progress.advance(1, [])
        elif change == "close":
            progress.close({"epoch": 1})
        else:
            progress.next_epoch({"epoch": 1} if change == "epoch" else None)
    assert expected == progress.complete(Plan.create(ranks=1, cores=1, **options))


def stopped_and_resumed(world, folder, strategy):
    given = {"optimizer": "sgd", "batch_size": 8, "epochs": 1, "strategy": strategy, "check": "no"}
    if world.size == 1:
        return train(world, mlp(), classes(40), checkpoint=folder, commands=stop_after(3), **given)[0].history
    return train(world, mlp(), classes(40), resume=folder, **given)[0].history


def test_a_row_that_began_on_another_mesh_counts_each_step_once(run_ranks, tmp_path):
    """Of ranks that compute the same loss, one counts."""
    (expected,), _ = train(World(), mlp(), classes(40), optimizer="sgd", batch_size=8, epochs=1)[0].history, None
    run_ranks(1, stopped_and_resumed, str(tmp_path), "dp=1")
    for (row,) in run_ranks(2, stopped_and_resumed, str(tmp_path), "tp=2"):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-12)


def rows_of(world):
    result, _ = train(world, mlp(), classes(40), optimizer="sgd", batch_size=16, epochs=2)
    return [{**row, "seconds": 0} for row in result.history]


def test_a_row_is_the_same_on_all_ranks(run_ranks):
    """And counts all ranks' samples."""
    first, second = run_ranks(2, rows_of)
    assert first == second
    expected, _ = train(World(), mlp(), classes(40), optimizer="sgd", batch_size=16, epochs=2, accumulate=2)
    assert [{**row, "seconds": 0} for row in expected.history] == first

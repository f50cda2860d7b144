"""A function that is called after each epoch: on rank 0, with the whole model, wherever its parts are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from problems import SGD, alone, assert_same_bits, classes, mlp, train, weights
from test_weight_copies import with_norm

from nbdist.core.strategies import choice
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan
from nbdist.telemetry import ListSink, Noted

OPTIONS = {"optimizer": SGD, "batch_size": 8, "shuffle": False, "epochs": 3}


class Seen:
    """Keeps what it gets, and ends the run after an epoch."""

    def __init__(self, last=9):
        self.last, self.weights, self.rows, self.modes = last, [], [], []

    def __call__(self, model, row):
        self.weights.append(weights(model))
        self.rows.append(row)
        self.modes.append((model.training, torch.is_grad_enabled()))
        torch.rand(3)
        return row["epoch"] >= self.last


def run(world, mesh, make, function, options):
    choice.SHARED_ABOVE = 0 if mesh == "shared" else 1 << 40
    strategy, sink = "dp=2" if mesh == "shared" else mesh, ListSink()
    result, trained = train(
        world, make(), classes(16), strategy=strategy, each_epoch=function, sinks=[sink], **OPTIONS | options
    )
    notes = [event.text for event in sink.events if isinstance(event, Noted)]
    return result.history, trained, function, notes


@pytest.mark.parametrize(
    ("mesh", "ranks"),
    [("dp=1", 1), ("dp=2", 2), ("shared", 2), ("shard=2", 2), ("tp=2", 2), ("pp=2", 2), ("dp=2,shard=2", 4)],
)
def test_it_gets_the_whole_model_of_each_epoch(run_ranks, mesh, ranks):
    """In evaluation mode and without gradients; the training has the bits that it has without."""
    options = {"val": classes(8)}
    make = mlp if mesh in ("tp=2", "pp=2") else with_norm
    without = run_ranks(ranks, run, mesh, make, None, options)[0][1]
    history, trained, seen, _ = run_ranks(ranks, run, mesh, make, Seen(), options)[0]
    assert_same_bits(without, trained)
    assert history == seen.rows
    assert [(False, False)] * 3 == seen.modes
    for epochs, found in enumerate(seen.weights, 1):
        expected = run_ranks(ranks, run, mesh, make, None, {**options, "epochs": epochs})[0][1]
        assert_same_bits(expected, found)


@pytest.mark.parametrize(("mesh", "ranks"), [("dp=1", 1), ("dp=2", 2), ("shard=2", 2)])
def test_it_ends_the_run(run_ranks, mesh, ranks):
    """On all ranks, with a note that says why."""
    results = run_ranks(ranks, run, mesh, mlp, Seen(last=2), {})
    assert [2] * ranks == [len(history) for history, *_ in results]
    assert [note for note in results[0][3] if "early" in note] == ["the run ends early: Seen returned True"]
    assert [0] * (ranks - 1) == [len(seen.rows) for _, _, seen, _ in results[1:]]


@pytest.mark.parametrize(
    ("returned", "epochs"), [(np.True_, 1), (torch.tensor(True), 1), (None, 3), (1, 3), (np.False_, 3), ("yes", 3)]
)
def test_only_true_ends_it(returned, epochs):
    """NumPy's and torch's too; a number or a figure does not."""
    result, _ = alone(mlp(), classes(16), each_epoch=lambda model, row: returned, **OPTIONS)
    assert epochs == len(result.history)


def breaking(model, row):
    """Fails in the second epoch."""
    if row["epoch"] == 2:
        raise ValueError("no room for the plot")


def writing(model, row):
    """Writes to a parameter, in vain."""
    model[0].weight.mul_(0.5)


def freezing(model, row):
    """Freezes a layer, in vain."""
    model[0].requires_grad_(False)


@pytest.mark.parametrize(
    ("function", "sentence"),
    [
        (breaking, r"^each_epoch=breaking fails after epoch 2: ValueError: no room for the plot"),
        (writing, r"^each_epoch=writing changes parameter 0.weight of the model, which does not reach the engines"),
        (freezing, r"^each_epoch=freezing changes parameter 0.weight of the model, which does not reach"),
    ],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_what_goes_wrong_in_it_is_an_error_of_the_run(run_ranks, ranks, function, sentence):
    """Of every rank; a change that would be lost is one too."""
    with pytest.raises(TaskError, match=sentence):
        run_ranks(ranks, run, f"dp={ranks}", mlp, function, {})


def test_it_needs_the_whole_model():
    """Which is not gathered for it alone."""
    with pytest.raises(
        PlanError, match="each_epoch=show gets the whole model, and gather is off: leave one of the two"
    ):
        Plan.create(ranks=1, cores=1, gather=False, each_epoch="show")


def test_it_sees_epochs():
    """Under steps there are none."""
    with pytest.raises(PlanError, match="each_epoch=show looks at epochs, and steps=8: give epochs"):
        Plan.create(ranks=1, cores=1, steps=8, each_epoch="show")


def test_a_model_that_cannot_be_copied():
    """Is a sentence, before anything is trained."""
    model = mlp()
    model.made = model[0].weight * 2
    with pytest.raises(
        TaskError, match="each_epoch=breaking gets a copy of the model, which cannot be copied: Runtime"
    ):
        alone(model, classes(16), each_epoch=breaking, **OPTIONS)

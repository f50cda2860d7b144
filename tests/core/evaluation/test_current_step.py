"""`nbdist.current_step()` beside training steps: in evaluations and after steps, the number of steps so far."""

from __future__ import annotations

import pytest
import torch
from problems import classes, mlp, train_task
from torch.nn import functional as F

import nbdist
from nbdist.core.task.task import Task

rates = []


def anneals(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    return loss, {"step": float(nbdist.current_step())}


def after(model):
    rates.append(nbdist.current_step())


def run(world):
    rates.clear()
    task = Task.create(mlp(), classes(24), step=anneals, val=classes(8), batch_size=8, after_step=after)
    result = train_task(world, task, epochs=2, check="no")
    return result.history, list(rates), nbdist.current_step()


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_goes_on_counting(run_ranks, ranks):
    """So a term that grows with the steps is in the validation loss too."""
    for history, afterwards, outside in run_ranks(ranks, run):
        assert [1.0, 4.0] == [row["step"] for row in history]
        assert [3.0, 6.0] == [row["val_step"] for row in history]
        assert [0, 1, 2, 3, 4, 5] == afterwards
        assert outside == 0


def single(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("size", [1, 3, 50])
def test_batches_of_any_size_give_the_same_mean(run_ranks, size):
    """Also of fewer samples than ranks."""
    x, y = classes(7)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), size)
    expected = F.cross_entropy(mlp()(x), y).item()
    for row in run_ranks(2, measured, loader):
        assert row["val_loss"] == pytest.approx(expected, rel=1e-6)
        assert row["val_accuracy"] == pytest.approx((mlp()(x).argmax(1) == y).double().mean().item())


def measured(world, loader):
    task = Task.create(
        mlp(), classes(8), loss="cross_entropy", val=loader, metric="accuracy", optimizer="sgd", lr=1e-30
    )
    return train_task(world, task).history[0]

"""What is noted where a run begins, since it is often not meant: once, on rank 0."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import SGD, alone, classes, mlp, train
from torch import nn
from torch.nn import functional as F

from nbdist.errors import TaskError
from nbdist.telemetry import ListSink, Noted

DATA = classes(16, torch.float32)
SCHEDULERS = torch.optim.lr_scheduler


def notes_of(model, world=None, **options):
    sink = ListSink()
    options = {"optimizer": SGD, "batch_size": 4, "check": "no", "sinks": [sink], **options}
    if world is None:
        alone(model, DATA, **options)
    else:
        train(world, model, DATA, **options)
    return [event.text for event in sink.events if isinstance(event, Noted)]


def on_each_rank(world):
    return notes_of(mlp(torch.float32).eval(), world)


def test_a_model_in_evaluation_mode(run_ranks):
    """It is trained in training mode; one whose layers alone are in it keeps them there, without a note."""
    first, second = run_ranks(2, on_each_rank)
    assert 1 == len(first)
    assert first[0].startswith("the model was given in evaluation mode, and is trained in training mode, with dropout")
    assert [] == second
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[1].eval()
    before = model[1].running_mean.clone()
    assert [] == notes_of(model)
    assert torch.equal(before, model[1].running_mean)


def test_parameters_in_no_optimizer():
    """Those that are frozen are meant."""
    model = mlp(torch.float32)
    optimizer = SGD(model[3].parameters())
    assert [
        "no optimizer holds 0.weight and 1 more, so they are not trained: freeze them, or give them to it"
    ] == notes_of(model, optimizer=optimizer)
    model[0].requires_grad_(False)
    assert [] == notes_of(model, optimizer=optimizer)


def test_a_learning_rate_of_zero():
    """A scheduler may begin there."""
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert ["the learning rate is 0, so nothing is trained"] == notes_of(model, optimizer=optimizer)
    assert [] == notes_of(model, optimizer=optimizer, lr_scheduler=lambda o: SCHEDULERS.LambdaLR(o, lambda step: 1.0))


def test_a_module_beside_the_model_that_gets_gradients():
    """Not one that is computed without them, as a teacher is."""
    head, model = nn.Linear(3, 3), mlp(torch.float32)

    def with_head(net, batch):
        return F.cross_entropy(head(net(batch[0])), batch[1])

    def with_teacher(net, batch):
        with torch.no_grad():
            target = head(batch[0][:, :3])
        return F.mse_loss(net(batch[0]), target)

    (note,) = notes_of(model, step=with_head)
    assert note.startswith("the step computes gradients of head.weight and 1 more, but only the model is trained: make")
    head.zero_grad()
    assert [] == notes_of(model, step=with_teacher)


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda o: SCHEDULERS.CosineAnnealingLR(o, T_max=4), "CosineAnnealingLR has T_max 4"),
        (lambda o: SCHEDULERS.StepLR(o, 2), "StepLR has step_size 2"),
        (lambda o: SCHEDULERS.MultiStepLR(o, [2, 3]), "MultiStepLR has the last milestone 3"),
        (lambda o: SCHEDULERS.ChainedScheduler([SCHEDULERS.StepLR(o, 3)]), "StepLR has step_size 3"),
    ],
)
def test_a_scheduler_that_seems_to_count_epochs(make, what):
    """It is stepped after each update."""
    (note,) = notes_of(mlp(torch.float32), lr_scheduler=make, epochs=4)
    assert f"lr_scheduler {what}, as if it counted the 4 epochs, but it is stepped after each of the 16 updates" in note
    assert note.endswith("schedule_by='epoch' (--schedule-by epoch) steps it by epochs")
    assert [] == notes_of(mlp(torch.float32), lr_scheduler=make, epochs=4, schedule_by="epoch")


def test_a_scheduler_that_seems_to_count_steps():
    """It is stepped after each epoch."""
    make = functools.partial(SCHEDULERS.CosineAnnealingLR, T_max=16)
    (note,) = notes_of(mlp(torch.float32), lr_scheduler=make, epochs=4, schedule_by="epoch")
    what = "has T_max 16, as if it counted the 16 updates, but it is stepped after each of the 4 epochs"
    assert note == f"lr_scheduler CosineAnnealingLR {what}: leave schedule_by out"


@pytest.mark.parametrize(
    "make",
    [
        lambda o: SCHEDULERS.CosineAnnealingLR(o, T_max=16),
        lambda o: SCHEDULERS.StepLR(o, 8),
        lambda o: SCHEDULERS.MultiStepLR(o, [4, 8]),
        lambda o: SCHEDULERS.ExponentialLR(o, 0.9),
    ],
)
def test_a_scheduler_that_counts_steps(make):
    """It is not noted; nor is anything where a run's length is in steps."""
    assert [] == notes_of(mlp(torch.float32), lr_scheduler=make, epochs=4)
    assert [] == notes_of(mlp(torch.float32), lr_scheduler=lambda o: SCHEDULERS.StepLR(o, 2), steps=16)


def test_a_scheduler_that_ends_before_the_run():
    """It would raise in the middle."""
    with pytest.raises(TaskError, match=r"OneCycleLR ends after 4 steps, and the run has 16: .* total_steps=16"):
        notes_of(mlp(torch.float32), lr_scheduler=lambda o: SCHEDULERS.OneCycleLR(o, 0.1, total_steps=4), epochs=4)
    make = functools.partial(SCHEDULERS.OneCycleLR, max_lr=0.1, total_steps=4)
    with pytest.raises(TaskError, match=r"OneCycleLR ends after 4 steps, and the run has 5: .* each epoch"):
        notes_of(mlp(torch.float32), lr_scheduler=make, epochs=5, schedule_by="epoch")
    assert [] == notes_of(mlp(torch.float32), lr_scheduler=make, epochs=4, schedule_by="epoch")

"""Learning-rate schedulers: what is accepted, and when they step."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler

from nbdist.core.optim.lr_schedulers import Scheduler, check_scheduler
from nbdist.errors import TaskError


def optimizer(**options):
    groups = [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(3)], "lr": 0.5}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, **options)


def rates(of):
    return [group["lr"] for group in of.param_groups]


def test_without_one_rates_stay():
    """It can be stepped, and does nothing."""
    sgd = optimizer()
    scheduler = Scheduler(None, sgd)
    assert scheduler.every_step
    scheduler.step()
    assert rates(sgd) == [0.1, 0.5]


def test_it_steps_with_the_optimizer():
    """Each group has its own rate."""
    sgd = optimizer()
    scheduler = Scheduler(functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5), sgd)
    assert scheduler.every_step
    sgd.step()
    scheduler.step()
    assert rates(sgd) == [0.05, 0.25]


def test_one_that_follows_a_value_steps_after_an_epoch():
    """With the measured value."""
    sgd = optimizer()
    scheduler = Scheduler(functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5), sgd)
    assert not scheduler.every_step
    for loss in (1.0, 0.5, 0.7):
        scheduler.step(loss)
    assert rates(sgd) == [0.05, 0.25]


@pytest.mark.parametrize(
    "make",
    [
        functools.partial(lr_scheduler.OneCycleLR, max_lr=[1.0, 2.0], total_steps=10),
        functools.partial(lr_scheduler.CosineAnnealingLR, T_max=3),
        functools.partial(lr_scheduler.LambdaLR, lr_lambda=[lambda step: 1.0, lambda step: 0.5]),
        functools.partial(lr_scheduler.CyclicLR, base_lr=0.1, max_lr=1.0),
        lambda made: lr_scheduler.SequentialLR(
            made, [lr_scheduler.ConstantLR(made), lr_scheduler.ExponentialLR(made, 0.9)], milestones=[2]
        ),
    ],
)
def test_the_check_leaves_the_optimizer_alone(make):
    """The factory is tried on a dummy optimizer with as many groups."""
    sgd = optimizer()
    before = sgd.state_dict()
    step, groups = sgd.step, [dict(group) for group in sgd.param_groups]
    check_scheduler(make, sgd)
    assert sgd.state_dict() == before
    assert sgd.step == step
    assert [group.keys() for group in groups] == [group.keys() for group in sgd.param_groups]


def test_a_scheduler_that_is_already_made():
    """Its optimizer is not the one that trains."""
    with pytest.raises(TaskError, match="not a value of type StepLR: write lambda optimizer:"):
        check_scheduler(lr_scheduler.StepLR(optimizer(), 1), optimizer())


def test_a_factory_that_fails():
    """The error names the factory and the reason."""
    with pytest.raises(TaskError, match=r"lr_scheduler StepLR cannot make a scheduler: TypeError: .*step_size"):
        check_scheduler(lr_scheduler.StepLR, optimizer())
    with pytest.raises(TaskError, match=r"lr_scheduler partial cannot make a scheduler: ValueError: .*2.*3"):
        check_scheduler(functools.partial(lr_scheduler.LambdaLR, lr_lambda=[float] * 3), optimizer())


def test_a_factory_of_something_else():
    """The factory must return an object with `step`."""
    with pytest.raises(TaskError, match="lr_scheduler factory returned SimpleNamespace, not a torch scheduler"):
        check_scheduler(factory, optimizer())


def factory(_optimizer):
    return SimpleNamespace()

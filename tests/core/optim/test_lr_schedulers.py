"""Learning-rate schedulers: what is accepted, and when they step."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.optim import lr_scheduler

from nbdist.core.optim.lr_schedulers import Schedulers, check_scheduler
from nbdist.errors import TaskError


def optimizer(**options):
    groups = [{"params": [torch.zeros(2)]}, {"params": [torch.zeros(3)], "lr": 0.5}]
    return torch.optim.SGD(groups, lr=0.1, momentum=0.9, **options)


def rates(of):
    return [group["lr"] for group in of.param_groups]


def test_without_one_rates_stay():
    """It can be stepped, and does nothing."""
    sgd = optimizer()
    schedulers = Schedulers({"": sgd}, {})
    schedulers.end_update()
    schedulers.end_epoch()
    schedulers.end_row(1.0)
    assert rates(sgd) == [0.1, 0.5]


def test_it_steps_with_the_optimizer():
    """Each group has its own rate."""
    sgd = optimizer()
    schedulers = Schedulers({"": sgd}, {"": functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)})
    sgd.step()
    schedulers.end_update()
    schedulers.end_epoch()
    schedulers.end_row(1.0)
    assert rates(sgd) == [0.05, 0.25]


def test_it_steps_by_epochs():
    """Where it is asked to; one that follows a value does so anyway, once a row."""
    first, second = optimizer(), optimizer()
    factories = {
        "first": functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5),
        "second": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1),
    }
    schedulers = Schedulers({"first": first, "second": second}, factories, "epoch")
    for one in (first, second):
        one.step()
    schedulers.end_update()
    assert [0.1, 0.1] == [rates(one)[0] for one in (first, second)]
    schedulers.end_epoch()
    assert [0.05, 0.1] == [rates(one)[0] for one in (first, second)]
    for loss in (1.0, 2.0):
        schedulers.end_row(loss)
    assert [0.05, 0.01] == pytest.approx([rates(one)[0] for one in (first, second)])


def test_one_that_follows_a_value_steps_after_an_epoch():
    """With the measured value."""
    sgd = optimizer()
    make = functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5)
    schedulers = Schedulers({"": sgd}, {"": make})
    for loss in (1.0, 0.5, 0.7):
        schedulers.end_update()
        schedulers.end_row(loss)
    assert rates(sgd) == [0.05, 0.25]


def test_each_optimizer_has_its_own():
    """One steps with the updates, one after an epoch, the third optimizer has none."""
    first, second, third = optimizer(), optimizer(), optimizer()
    factories = {
        "first": functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5),
        "second": functools.partial(lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1),
    }
    schedulers = Schedulers({"first": first, "second": second, "third": third}, factories)
    for one in (first, second, third):
        one.step()
    schedulers.end_update()
    assert [rates(one) for one in (first, second, third)] == [[0.05, 0.25], [0.1, 0.5], [0.1, 0.5]]
    for loss in (1.0, 2.0):
        schedulers.end_row(loss)
    assert [0.05, 0.01, 0.1] == pytest.approx([rates(one)[0] for one in (first, second, third)])


def test_states_are_kept_by_name():
    """A state of no scheduler here, or a scheduler without a state, is left alone."""
    make = functools.partial(lr_scheduler.StepLR, step_size=5)
    optimizers = {"a": optimizer(), "b": optimizer()}
    before = Schedulers(optimizers, {"a": make, "b": make})
    for _ in range(3):
        for one in optimizers.values():
            one.step()
        before.end_update()
    after = Schedulers({"b": optimizer(), "c": optimizer()}, {"b": make, "c": make})
    after.load_state_dict(before.state_dict())
    assert dict(after.state_dict()["b"]["pairs"])["last_epoch"] == 3
    assert dict(after.state_dict()["c"]["pairs"])["last_epoch"] == 0


def test_one_rate_scales_those_of_all_optimizers():
    """It is the first one's; the others keep their proportion to it."""
    first, second = optimizer(), optimizer()
    Schedulers({"first": first, "second": second}, {}).set_rate(0.2)
    assert [0.2, 1.0, 0.2, 1.0] == pytest.approx(rates(first) + rates(second))


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


def test_an_optimizer_without_a_rate_has_none_to_report():
    """Its groups hold other settings."""
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=0.1)
    del optimizer.param_groups[0]["lr"]
    assert 0.0 == Schedulers({"": optimizer}, {}).rate


def test_a_state_that_was_stepped_otherwise_is_refused():
    """Its counter would stand for something else."""
    make = functools.partial(lr_scheduler.StepLR, step_size=5)
    saved = Schedulers({"": optimizer()}, {"": make}).state_dict()
    with pytest.raises(TaskError, match=r"was stepped by steps, and this one is by epochs: give schedule_by='step'"):
        Schedulers({"": optimizer()}, {"": make}, "epoch").load_state_dict(saved)

"""What was checked in this session is known: for the same model, step and mesh, and for no other."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import classes, mlp
from torch import nn
from torch.nn import functional as F

from nbdist.core.check.known_checks import KnownChecks
from nbdist.core.task.task import Task
from nbdist.plan import Plan

DATA = classes(16)


class Found:
    checked = "loss and 4 gradients are equal"


class Scaled:
    """A loss with an attribute of its own."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, output, target):
        return self.factor * F.mse_loss(output, F.one_hot(target, 3).double())


def scaled_by(factor):
    return lambda output, target: factor * F.cross_entropy(output, target)


def known(first, second):
    """What is known of a task with the second loss, after one with the first was checked."""
    checks, model = KnownChecks(), mlp()
    tasks = [Task.create(model, DATA, loss=first) if i == 0 else None for i in range(2)]
    plan = Plan.create(ranks=2, cores=2, **tasks[0].options)
    checks.add(tasks[0], plan, Found)
    del tasks[0], first
    return checks.find(
        Task.create(model, DATA, loss=second() if isinstance(second, functools.partial) else second), plan
    )


LOSS, MODULE, FUNCTION = Scaled(2.0), nn.CrossEntropyLoss(), scaled_by(2.0)


@pytest.mark.parametrize(
    "loss", ["cross_entropy", MODULE, LOSS, FUNCTION, F.cross_entropy],
    ids=["a name", "a module", "an object", "a closure", "of torch"],
)  # fmt: skip
def test_the_same_loss_is_known(loss):
    """Also one given by its name, for which a new object is made in each run."""
    assert known(loss, loss) == Found.checked


def test_another_loss_is_not_known():
    """Of another name, another object, or another value in a closure; also at the address of one that has died."""
    assert not known("cross_entropy", "nll")
    assert not known(MODULE, nn.CrossEntropyLoss(weight=torch.ones(3).double()))
    assert not known(FUNCTION, scaled_by(3.0))
    for _ in range(50):
        assert not known(Scaled(2.0), functools.partial(Scaled, 3.0))

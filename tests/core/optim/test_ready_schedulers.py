"""Schedulers that the user has made, for an optimizer that the user has made: as in a plain loop."""

from __future__ import annotations

import copy

import pytest
import torch
from problems import classes, mlp
from torch.nn import functional as F
from torch.optim import lr_scheduler

import nbdist
from nbdist.errors import TaskError

X, Y = classes(40)
OPTIONS = {"loss": "cross_entropy", "batch_size": 8, "shuffle": False, "verbose": False}
STEPS = 5  # in an epoch
MAKERS = {
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=3 * STEPS),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=3 * STEPS),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
}


def made(make):
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, make(optimizer)


def plain(make, epochs, by="step"):
    """The loop of one process."""
    model, optimizer, scheduler = made(make)
    for _ in range(epochs):
        total = 0.0
        for x, y in zip(X.split(8), Y.split(8), strict=True):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            total += loss.item()
            if by == "step":
                scheduler.step()
        if by == "epoch":
            scheduler.step()
        elif by == "plateau":
            scheduler.step(total / STEPS)
    return model, optimizer, scheduler


def check(mine, plain):
    for (_, one), (_, other) in zip(mine[0].named_parameters(), plain[0].named_parameters(), strict=True):
        torch.testing.assert_close(one, other)
    assert mine[1].param_groups[0]["lr"] == pytest.approx(plain[1].param_groups[0]["lr"], rel=1e-12)
    assert mine[2].last_epoch == plain[2].last_epoch


@pytest.mark.parametrize("name", MAKERS)
def test_it_is_stepped_as_in_a_plain_loop_and_goes_on_in_the_next_run(name):
    """The user's own object; a second run begins where the first has ended."""
    mine = model, optimizer, scheduler = made(MAKERS[name])
    for _ in range(2):
        nbdist.train(model, (X, Y), optimizer=optimizer, lr_scheduler=scheduler, epochs=1, **OPTIONS)
    check(mine, plain(MAKERS[name], 2))


def test_by_epoch_and_by_the_loss():
    """As the option says; a ReduceLROnPlateau after each epoch."""
    steps = lambda o: lr_scheduler.StepLR(o, 2, 0.5)  # noqa: E731
    mine = model, optimizer, scheduler = made(steps)
    nbdist.train(model, (X, Y), optimizer=optimizer, lr_scheduler=scheduler, epochs=3, schedule_by="epoch", **OPTIONS)
    check(mine, plain(steps, 3, "epoch"))
    plateau = lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5)  # noqa: E731
    mine = model, optimizer, scheduler = made(plateau)
    nbdist.train(model, (X, Y), optimizer=optimizer, lr_scheduler=scheduler, epochs=3, **OPTIONS)
    check(mine, plain(plateau, 3, "plateau"))
    assert optimizer.param_groups[0]["lr"] < 0.1


def test_on_engines_its_state_comes_back(cluster):
    """With that of its optimizer; a kernel's own objects go on from run to run."""
    mine = model, optimizer, scheduler = made(MAKERS["one cycle"])
    options = {name: value for name, value in OPTIONS.items() if name != "verbose"}
    for _ in range(2):
        cluster.train(model, (X, Y), optimizer=optimizer, lr_scheduler=scheduler, epochs=1, **options)
    check(mine, plain(MAKERS["one cycle"], 2))


def test_a_rehearsal_leaves_it_as_it_was():
    """Rates and counts."""
    model, optimizer, scheduler = made(MAKERS["cosine"])
    before = copy.deepcopy(scheduler.state_dict())
    nbdist.train(model, (X, Y), optimizer=optimizer, lr_scheduler=scheduler, epochs=1, rehearse=True, **OPTIONS)
    assert (before, 0.1) == (scheduler.state_dict(), optimizer.param_groups[0]["lr"])


def test_each_of_several_optimizers_may_have_its_own():
    """By the optimizer that it was made for, without a dict."""
    pair = {"a": mlp(), "b": mlp()}
    adam = {name: torch.optim.SGD(part.parameters(), lr=0.1) for name, part in pair.items()}
    scheduler = lr_scheduler.ExponentialLR(adam["b"], 0.5)

    def step(model, batch):
        return sum(F.cross_entropy(part(batch[0]), batch[1]) for part in model.values())

    nbdist.train(pair, (X, Y), step=step, optimizer=adam, lr_scheduler=scheduler, steps=2, batch_size=8, verbose=False)
    assert {"a": 0.1, "b": 0.025} == {name: one.param_groups[0]["lr"] for name, one in adam.items()}


def test_a_scheduler_of_another_optimizer_is_refused():
    """In one sentence."""
    model, _, scheduler = made(MAKERS["cosine"])
    with pytest.raises(TaskError, match="CosineAnnealingLR sets the rates of another optimizer: give that one"):
        nbdist.train(model, (X, Y), optimizer="sgd", lr_scheduler=scheduler, **OPTIONS)


def test_one_that_has_made_its_steps_is_refused():
    """As where a cell runs again that trains, and not the one that makes it."""
    model, optimizer, scheduler = made(MAKERS["one cycle"])
    options = {"optimizer": optimizer, "lr_scheduler": scheduler, "epochs": 2, **OPTIONS}
    nbdist.train(model, (X, Y), **options)
    with pytest.raises(TaskError, match="has made 10 of its 15 steps before this run, which has 10: make it again"):
        nbdist.train(model, (X, Y), **options)


class Odd(lr_scheduler.LRScheduler):
    """Keeps what no checkpoint can hold."""

    def __init__(self, optimizer):
        self.thing = object()
        super().__init__(optimizer)

    def get_lr(self):
        return [0.05 for _ in self.base_lrs]


def test_a_state_that_no_checkpoint_can_hold_fails_no_run_without_one():
    """It is read where it is saved."""
    assert "finished" == nbdist.train(mlp(), (X, Y), optimizer="sgd", lr_scheduler=Odd, epochs=1, **OPTIONS).state

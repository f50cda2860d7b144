"""Dry runs before the first step: what the step and the model count is what they count in one process."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import FEATURES, classes, seeded, train
from torch import nn
from torch.nn import functional as F

from nbdist.errors import PeerLostError, PlanError, TaskError

SAMPLES, STEPS = 16, 2


class Counted:
    """An object of the user's that the step and the forward count with."""

    def __init__(self):
        self.calls = {"step": 0, "forward": 0}


TOTAL = Counted()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 8), nn.Linear(8, FEATURES)
        self.counted = Counted()

    def forward(self, x):
        self.counted.calls["forward"] += 1
        TOTAL.calls["forward"] += 1
        return self.last(self.first(x).tanh())


def counts(world, options):
    TOTAL.__init__()
    model, own = seeded(Net), Counted()

    def step(model, batch):
        own.calls["step"] += 1
        TOTAL.calls["step"] += 1
        return F.mse_loss(model(batch[0]), batch[1])

    x = classes(SAMPLES)[0].float()
    train(world, model, (x, x), step=step, batch_size=8, steps=STEPS, optimizer="sgd", **options)
    return own.calls["step"], TOTAL.calls["step"], model.counted.calls["forward"], TOTAL.calls["forward"]


@pytest.mark.parametrize("check", ["yes", "no"])
@pytest.mark.parametrize("mesh", ["dp=2", "shard=2", "tp=2"])
def test_a_step_and_a_forward_count_their_own_calls(run_ranks, mesh, check):
    """The same on every rank, with and without the check: one call a step."""
    assert [(STEPS,) * 4] * 2 == run_ranks(2, counts, {"strategy": mesh, "check": check})


@pytest.mark.parametrize("check", ["yes", "no"])
def test_a_pipeline_counts_each_microbatch(run_ranks, check):
    """Once on each rank; what a traced forward counts beside its output is not run."""
    for own, total, *_ in run_ranks(2, counts, {"strategy": "pp=2", "check": check, "microbatches": 2}):
        assert (own, total) == (2 * STEPS, 2 * STEPS)


class WithIterator(Net):
    def __init__(self):
        super().__init__()
        self.numbers = itertools.count()

    def forward(self, x):
        return super().forward(x) * (1 + 0.01 * next(self.numbers))


def trained_with_iterator(world, mesh):
    model = seeded(WithIterator)
    x = classes(SAMPLES)[0].float()
    try:
        train(world, model, (x, x), loss="mse", batch_size=8, steps=STEPS, optimizer="sgd", strategy=mesh)
    except PlanError as error:
        return str(error), next(model.numbers)
    return "", next(model.numbers)


@pytest.mark.parametrize("mesh", ["shard=2", "tp=2", "pp=2"])
def test_an_iterator_that_dry_runs_would_advance_is_refused(run_ranks, mesh):
    """Nobody can put it back; with the strategy data there are no dry runs, and the check leaves it alone."""
    message = f"the step or the model takes from model.numbers, an iterator, which dry runs for mesh {mesh} advance"
    for error, following in run_ranks(2, trained_with_iterator, mesh):
        assert error.startswith(message)
        assert following == 0
    assert [("", STEPS)] * 2 == run_ranks(2, trained_with_iterator, "dp=2")


class Writing(Net):
    """Its forward writes into its input."""

    def forward(self, x):
        return super().forward(x.div_(2.0))


def writing(model, batch):
    """A step that writes into its batch before the model sees it."""
    x, y = batch
    x.sub_(0.5).mul_(1.5)
    return F.mse_loss(model(x), y)


def step_of(kind):
    return writing if kind == "step" else lambda model, batch: F.mse_loss(model(batch[0]), batch[1])


def trained_in_place(world, kind, mesh):
    model = seeded(Writing if kind == "forward" else Net, torch.float64)
    x = classes(SAMPLES)[0]
    data = x.clone(), x.clone()
    options = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "shuffle": False, "strategy": mesh}
    result, trained = train(world, model, data, step=step_of(kind), steps=2 * STEPS, **options)
    assert all(torch.equal(x, tensor) for tensor in data)
    return result.plan.checked, trained


@pytest.mark.parametrize("kind", ["step", "forward"])
@pytest.mark.parametrize("mesh", ["dp=2", "shard=2", "tp=2", "pp=2"])
def test_a_batch_that_is_written_into_is_read_anew(run_ranks, kind, mesh):
    """By the check and by each dry run: the user's data stay as they are, and the result is the plain loop's."""
    model = seeded(Writing if kind == "forward" else Net, torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x in classes(SAMPLES)[0].split(8) * STEPS:
        optimizer.zero_grad()
        step_of(kind)(model, (x.clone(), x.clone())).backward()
        optimizer.step()
    for checked, trained in run_ranks(2, trained_in_place, kind, mesh):
        assert checked.startswith("loss, 4 gradients, 4 updates")
        torch.testing.assert_close(trained, dict(model.state_dict()), rtol=1e-12, atol=1e-12)


def thawing(world, mesh):
    model, calls = seeded(Net), []

    def step(model, batch):
        calls.append(1)
        model.first.requires_grad_(len(calls) > 10)
        return F.mse_loss(model(batch[0]), batch[1])

    x = classes(SAMPLES)[0].float()
    with pytest.raises((TaskError, PeerLostError)) as raised:
        train(world, model, (x, x), step=step, batch_size=8, steps=STEPS, optimizer="sgd", strategy=mesh)
    assert all(parameter.requires_grad for parameter in model.parameters())
    return str(raised.value)


@pytest.mark.parametrize("mesh", ["dp=2", "shard=2", "tp=2", "pp=2"])
def test_a_step_that_freezes_is_refused_before_the_first_update(run_ranks, mesh):
    """In a sentence; what its dry runs froze is as it was."""
    assert any(error.startswith("first.weight was frozen in step 1: ") for error in run_ranks(2, thawing, mesh))


def trained_beside_iterator(world, when):
    numbers = itertools.count()

    def step(model, batch):
        before = next(numbers) if when == "before" else 0
        loss = F.mse_loss(model(batch[0]), batch[1])
        return loss * (1 + 0.01 * (next(numbers) if when == "after" else before))

    x = classes(SAMPLES)[0].float()
    try:
        train(world, seeded(Net), (x, x), step=step, batch_size=8, steps=STEPS, optimizer="sgd", strategy="shard=2")
    except PlanError as error:
        return str(error)
    return next(numbers)


def test_an_iterator_of_the_step_is_refused_if_a_dry_run_takes_from_it(run_ranks):
    """A dry run ends at the call of the model, so what is taken afterwards is right."""
    refused = "the step or the model takes from numbers, an iterator, which dry runs for mesh shard=2 advance"
    assert all(error.startswith(refused) for error in run_ranks(2, trained_beside_iterator, "before"))
    assert [STEPS] * 2 == run_ranks(2, trained_beside_iterator, "after")

"""Dry runs before the first step: what the step and the model count is what they count in one process."""

from __future__ import annotations

import itertools

import pytest
from problems import FEATURES, classes, seeded, train
from torch import nn
from torch.nn import functional as F

from nbdist.errors import PlanError

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
    message = (
        f"the step or the model can reach model.numbers, an iterator, which dry runs for mesh {mesh} would advance"
    )
    for error, following in run_ranks(2, trained_with_iterator, mesh):
        assert error.startswith(message)
        assert following == 0
    assert [("", STEPS)] * 2 == run_ranks(2, trained_with_iterator, "dp=2")

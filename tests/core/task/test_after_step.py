"""A function that is called after each step, in a run."""

from __future__ import annotations

import secrets

import pytest
import torch
from problems import SGD, alone, assert_same_bits, classes, mlp, train
from torch.nn import functional as F

from nbdist.core.strategies import choice
from nbdist.errors import PlanError, TaskError
from nbdist.plan import Plan

OPTIONS = {"optimizer": SGD, "batch_size": 8, "shuffle": False, "epochs": 2}
LIMIT = 0.1


def clamp(model):
    """As a Wasserstein critic's weights are."""
    for parameter in model.parameters():
        parameter.clamp_(-LIMIT, LIMIT)


def jitter(model):
    """Random, but the same on all ranks."""
    for parameter in model.parameters():
        parameter += 0.01 * torch.randn_like(parameter)


def plain(function):
    model, (x, y) = mlp(), classes(16)
    optimizer = SGD(model.parameters())
    for start in (0, 8, 0, 8):
        optimizer.zero_grad()
        F.cross_entropy(model(x[start : start + 8]), y[start : start + 8]).backward()
        optimizer.step()
        with torch.no_grad():
            function(model)
    return model.state_dict()


def run(world, function, options):
    choice.SHARED_ABOVE = 0  # weights would be shared, if nobody wrote to all of them
    return train(world, mlp(), classes(16), after_step=function, **OPTIONS | options)[1]


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_it_is_called_once_a_step(run_ranks, ranks, accumulate):
    """Whatever the microbatches; the weights are those of a plain loop."""
    for weights in run_ranks(ranks, run, clamp, {"accumulate": accumulate}):
        assert max(float(tensor.abs().max()) for tensor in weights.values()) == LIMIT
        for name, expected in plain(clamp).items():
            torch.testing.assert_close(weights[name], expected, rtol=1e-10, atol=1e-12)


def test_its_random_numbers_are_the_same_on_all_ranks(run_ranks):
    """And on any number of them."""
    alone_bits, *others = (run_ranks(ranks, run, jitter, {"reproducible": 4})[-1] for ranks in (1, 2, 3))
    for weights in others:
        assert_same_bits(alone_bits, weights)
    assert not torch.equal(alone_bits["0.weight"], plain(lambda model: None)["0.weight"])


def failing(model):
    """Has a typing error."""
    model.wieght.clamp_(0)


def drifting(model):
    """Draws from a generator that nobody seeds."""
    model[0].weight += secrets.randbelow(1 << 32)


class Counting:
    """Depends on what it keeps, which is put back between two calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        model[0].bias += self.calls


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_fails_before_the_first_update(run_ranks, ranks):
    """With its error, on all ranks."""
    with pytest.raises(TaskError, match=r"^failing\(model\), called after each step, fails: AttributeError: .*wieght"):
        run_ranks(ranks, run, failing, {})


def test_it_does_the_same_on_every_rank(run_ranks):
    """Else their weights would drift apart."""
    with pytest.raises(
        TaskError, match=r"^drifting\(model\), called after each step, gives 0.weight other values when"
    ):
        run_ranks(2, run, drifting, {})


def test_what_it_keeps_is_put_back():
    """The check calls it twice, and the run from the first step on."""
    function = Counting()
    _, weights = alone(mlp(), classes(16), after_step=function, **OPTIONS)
    assert function.calls == 4
    calls = Counting()
    assert_same_bits(plain(calls), weights)


def test_the_mesh_must_not_cut_the_model():
    """It sees the whole one."""
    with pytest.raises(PlanError, match="after_step=clamp sees the whole model, and mesh shard=2 cuts it: use --strat"):
        Plan.create(ranks=2, cores=2, strategy="shard=2", after_step="clamp")


@pytest.mark.parametrize("given", ["clamp", 3, torch.nn.Linear])
def test_it_is_a_function(given):
    """Nothing else."""
    with pytest.raises(TaskError, match=r"^after_step must be a callable after_step\(model\), not"):
        alone(mlp(), classes(16), after_step=given, **OPTIONS)

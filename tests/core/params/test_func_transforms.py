"""Transforms of torch.func in a step: right where a rank holds the whole model, and refused in a sentence elsewhere."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import classes, mlp, train
from torch.nn import functional as F

from nbdist.errors import PlanError, TaskError

RUN = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "steps": 2, "shuffle": False}


def jacobians(model, batch):
    """A penalty on the Jacobian of each sample; the model is also called as usual, before or after."""
    x, y = batch
    jacobian = torch.func.vmap(torch.func.jacrev(lambda one: model(one[None])[0]))(x)
    return F.cross_entropy(model(x), y) + jacobian.square().sum((1, 2)).mean()


def called_before(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1]) + 0 * jacobians(model, batch)


def directional(model, batch):
    """Forward-mode differentiation, which has ended the process of a rank."""
    parameters = dict(model.named_parameters())
    ones = {name: torch.ones_like(p) for name, p in parameters.items()}

    def loss(values):
        return F.cross_entropy(torch.func.functional_call(model, values, (batch[0],)), batch[1])

    return torch.func.jvp(loss, (parameters,), (ones,))[0]


def run(world, step, **options):
    return train(world, mlp(), classes(16), step=step, **RUN, **options)[1]


@pytest.mark.parametrize("strategy", ["shard", "pipeline", "tensor"])
@pytest.mark.parametrize("step", [jacobians, called_before])
def test_a_split_model_inside_a_transform_is_refused(run_ranks, step, strategy):
    """In one sentence, also if the first call of the model is outside of it."""
    with pytest.raises(
        (PlanError, TaskError), match=r"inside a transform of torch\.func .*strategy data|calls model.* twice"
    ):
        run_ranks(2, functools.partial(run, step=step, strategy=strategy, check="no"))


def test_a_sharded_weight_inside_a_transform_is_refused(run_ranks):
    """It ended the rank's process."""
    with pytest.raises(PlanError, match=r"inside a transform of torch\.func"):
        run_ranks(2, functools.partial(run, step=directional, strategy="shard"))


@pytest.mark.parametrize("step", [jacobians, directional])
def test_data_parallel_ranks_transform_as_one_process(run_ranks, step):
    """The weights are those of one rank with as many slices."""
    expected = run_ranks(1, functools.partial(run, step=step, accumulate=2))[0]
    for found in run_ranks(2, functools.partial(run, step=step)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

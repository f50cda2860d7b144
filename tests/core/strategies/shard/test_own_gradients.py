"""Sharded blocks, and a step or an optimizer that takes gradients or assigns weights itself."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import classes, mlp, seeded, train
from torch import nn
from torch.nn import functional as F

from nbdist.errors import PlanError

RUN = {"batch_size": 8, "steps": 3, "shuffle": False}
SGD = {"optimizer": "sgd", "lr": 0.1, **RUN}


class Assigning(torch.optim.SGD):
    """Assigns new data to each parameter, as many optimizers of users do."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data = p.data - 0.1 * p.grad


def each_sample(model, batch):
    """An inner step of gradient descent for each sample: as many backwards in the step as samples."""
    losses = []
    for x, y in zip(batch[0].split(1), batch[1].split(1), strict=True):
        inner = F.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(inner, list(model.parameters()), create_graph=True)
        fast = {name: p - 0.1 * g for (name, p), g in zip(model.named_parameters(), gradients, strict=True)}
        losses.append(F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y))
    return torch.stack(losses).mean(), len(losses)


def own_backward(model, batch):
    x = batch[0].clone().requires_grad_()
    F.cross_entropy(model(x), batch[1]).backward()
    model.zero_grad()
    return F.cross_entropy(model((x + x.grad).detach()), batch[1])


class Looked(nn.Module):
    """An embedding whose gradient is sparse, by the functional form."""

    def __init__(self):
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        tokens = (x.abs() * 9).long().clamp(max=19)
        return self.out(self.hidden(F.embedding(tokens, self.table.weight, sparse=True).mean(1)).tanh())


def run(world, make=mlp, samples=24, **options):
    options = options if "step" in options else {"loss": "cross_entropy", **options}
    return train(world, make(), classes(samples), **options)[1]


def looked():
    return seeded(Looked, torch.float64)


def equal_on_two_ranks(run_ranks, strategy="shard", **options):
    expected = run_ranks(1, functools.partial(run, accumulate=2, **options))[0]
    for found in run_ranks(2, functools.partial(run, strategy=strategy, **options)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_data_that_an_optimizer_assigns_is_kept(run_ranks):
    """It was lost: each step began with the weights before the first one."""
    equal_on_two_ranks(run_ranks, optimizer=Assigning, **RUN)


def test_a_step_may_differentiate_more_often_on_one_rank(run_ranks):
    """Ranks of uneven slices wait for each other before the weights of slices are compared."""
    equal_on_two_ranks(run_ranks, step=each_sample, samples=21, check="no", **SGD)


@pytest.mark.parametrize("strategy", ["shard", "tensor", "data"])
def test_a_sparse_gradient_is_summed_as_a_dense_one(run_ranks, strategy):
    """Of a functional embedding: torch cannot reshape, or compare, a sparse one."""
    equal_on_two_ranks(run_ranks, strategy, make=looked, **SGD)


def test_a_backward_into_gradients_within_the_step_is_refused(run_ranks):
    """They are summed over the ranks at once, so ``zero_grad`` would come too late: in silence, until now."""
    with pytest.raises(PlanError, match=r"runs a backward of its own .*with torch\.autograd\.grad .*strategy data"):
        run_ranks(2, functools.partial(run, step=own_backward, strategy="shard", check="no", **SGD))


def test_gradients_cleared_within_the_step_do_not_count_with_data_parallelism(run_ranks):
    """Those of an adversarial example: one slice a rank gives what one process computes for it."""
    x, y = classes(8)
    expected = mlp()
    parts = []
    for rows in torch.arange(8).chunk(2):
        expected.zero_grad()
        own_backward(expected, (x[rows], y[rows])).backward()
        parts.append({name: p.grad.clone() for name, p in expected.named_parameters()})
    options = {**SGD, "steps": 1}
    for found in run_ranks(2, functools.partial(run, step=own_backward, check="no", samples=8, **options)):
        for name, p in expected.named_parameters():
            mean = (parts[0][name] + parts[1][name]) / 2
            torch.testing.assert_close(found[name], (p - 0.1 * mean).detach(), rtol=0, atol=1e-12)

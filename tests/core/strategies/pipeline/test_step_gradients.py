"""A step that differentiates through the model: refused on a pipeline in a sentence, and right if it meets no cut."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import classes, mlp, train
from torch.nn import functional as F

from nbdist.errors import PlanError

RUN = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "steps": 2, "shuffle": False}


def penalty(model, batch):
    x = batch[0].clone().requires_grad_()
    out = model(x)
    gradient = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
    return F.cross_entropy(out, batch[1]) + gradient.square().sum(1).mean()


def adversarial(model, batch):
    x = batch[0].clone().requires_grad_()
    loss = F.cross_entropy(model(x), batch[1])
    loss.backward(inputs=[x])
    return loss + 0 * x.grad.sum()


def own_backward(model, batch):
    loss = F.cross_entropy(model(batch[0]), batch[1])
    loss.backward(retain_graph=True)
    return loss


def by_output(model, batch):
    """The gradient of the loss by the model's output weights the loss: that is on the last stage."""
    out = model(batch[0])
    gradient = torch.autograd.grad(F.cross_entropy(out, batch[1], reduction="sum"), out, retain_graph=True)[0]
    return (F.cross_entropy(out, batch[1], reduction="none") * gradient.norm(dim=1)).mean()


def leaf_input(model, batch):
    """The input requires grad, and nobody asks for its gradient."""
    return F.cross_entropy(model(batch[0].clone().requires_grad_()), batch[1])


def run(world, step, **options):
    return train(world, mlp(), classes(16), step=step, **RUN, **options)[1]


@pytest.mark.parametrize("step", [penalty, adversarial, own_backward])
def test_a_gradient_through_the_cut_is_refused(run_ranks, step):
    """With the strategies on which it works; torch only said that a tensor was not used in the graph."""
    with pytest.raises(PlanError, match=r"takes a gradient through the model itself .*use the strategy data"):
        run_ranks(2, functools.partial(run, step=step, strategy="pipeline", split_at=["3"], microbatches=1, check="no"))


@pytest.mark.parametrize("step", [by_output, leaf_input])
def test_a_gradient_that_reaches_no_cut_is_that_of_one_process(run_ranks, step):
    """The step may differentiate what it computes from the model's output."""
    expected = run_ranks(1, functools.partial(run, step=step, accumulate=2))[0]
    for found in run_ranks(2, functools.partial(run, step=step, strategy="pipeline", split_at=["3"], microbatches=2)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

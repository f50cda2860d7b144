"""The collectives of split layers, in torch's graphs."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import seeded
from split_models import GPT, Block, numbers, only, parallelize, split, tokens
from torch import nn

CLOSE = {"rtol": 0, "atol": 1e-10}


def _export(world):
    model = seeded(lambda: GPT(functools.partial(Block, 0.0)), torch.float64)
    whole = seeded(lambda: GPT(functools.partial(Block, 0.0)), torch.float64)
    parts, _ = split(world, model, tokens())
    exported = torch.export.export(model, (tokens(),), strict=False).module()
    called = {str(node.target) for node in exported.graph.nodes if "nbdist" in str(node.target)}
    assert called == {"nbdist.copy_in.default", "nbdist.sum_out.default", "nbdist.gather_out.default"}
    for one in (whole, exported):
        one(tokens()).square().mean().backward()
    torch.testing.assert_close(exported(tokens()), whole(tokens()), **CLOSE)
    channel = world.channel()
    for name, parameter in whole.named_parameters():
        cut = parts.cuts.get(name)
        own = parameter.grad if cut is None else cut.part(parameter.grad, channel.rank, channel.size)
        torch.testing.assert_close(dict(exported.named_parameters())[name].grad, own, **CLOSE)
    parts.restore()
    with pytest.raises(RuntimeError, match="traced while the model was split"):
        exported(tokens())


def test_an_exported_model_runs_its_collectives(run_ranks):
    """The exported graph contains them; its forward and backward are those of the whole model."""
    run_ranks(2, _export)


def _penalized(model, x):
    """A loss with second derivatives by the input, as a physics-informed one has, and its gradients."""
    x = x.clone().requires_grad_()
    out = model(x)
    first = torch.autograd.grad(out.sum(), x, create_graph=True)[0]
    second = torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]
    ((second.sum(1) + out[:, 0]).square().mean() + (first.norm(dim=1) - 1).square().mean()).backward()
    return second.detach()


def _differentiate_twice(world, layers):
    make = functools.partial(seeded, lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)), torch.float64)
    whole, model = make(), make()
    channel = world.channel()
    parts = parallelize(model, channel, only(channel.size, layers))
    x = numbers(5, 6)
    torch.testing.assert_close(_penalized(model, x), _penalized(whole, x), **CLOSE)
    for name, parameter in whole.named_parameters():
        cut = parts.cuts.get(name)
        own = parameter.grad if cut is None else cut.part(parameter.grad, channel.rank, channel.size)
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, own, **CLOSE)
    parts.restore()


@pytest.mark.parametrize("layers", [{"0": "column", "2": "row"}, {"2": "column_gather"}], ids=str)
def test_a_gradient_is_differentiated_again(run_ranks, layers):
    """A gradient penalty and second derivatives through split layers are those of the whole model."""
    run_ranks(2, _differentiate_twice, layers)

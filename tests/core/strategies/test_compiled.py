"""Compiled models: their weights are trained in place on every strategy, and they stay compiled."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import classes, mlp, train, weights

RUN = {"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "steps": 2, "shuffle": False, "loss": "cross_entropy"}


def compiled():
    return torch.compile(mlp(), backend="eager")


def compiled_layers():
    model = mlp()
    for layer in model:
        layer.compile(backend="eager")
    return model


def run(world, make, **options):
    model = make()
    before = list(model.parameters())
    train(world, model, classes(16), **RUN, **options)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    return {name.removeprefix("_orig_mod."): tensor for name, tensor in weights(model).items()}


@pytest.mark.parametrize("strategy", ["data", "shard", "tensor"])
@pytest.mark.parametrize("make", [compiled, compiled_layers])
def test_a_compiled_model_trains_as_it_was_before(run_ranks, make, strategy):
    """Where ranks gather weights or sum activations inside, it runs eagerly: a compiler cannot trace that."""
    expected = run_ranks(1, functools.partial(run, make=mlp, accumulate=1 if strategy == "tensor" else 2))[0]
    for found in run_ranks(2, functools.partial(run, make=make, strategy=strategy)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)

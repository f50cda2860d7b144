"""Split layers: embeddings over ranks, and layers in an fx graph."""

from __future__ import annotations

import pytest
import torch
from problems import seeded
from split_models import model_and_example, only, split
from torch import nn

from nbdist.core.strategies.tensor import parallelize

CLOSE = {"rtol": 0, "atol": 1e-10}


def _trace_with_fx(world):
    model, example = model_and_example("mlp")
    expected = model.eval()(example)
    parts, _ = split(world, model, example)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(example), expected, **CLOSE)
    parts.restore()


def test_an_fx_graph_calls_the_split_layers(run_ranks):
    """torch's layers are leaves of the fx graph, and run with their replaced forward."""
    run_ranks(2, _trace_with_fx)


def _embeddings(world):
    table = seeded(lambda: nn.Embedding(8, 4, padding_idx=5), torch.float64)
    indices = torch.tensor([[0, 7, 3], [5, 4, 5]])
    expected = table(indices)
    expected.square().sum().backward()
    gradient = table.weight.grad
    parts = parallelize(table, world.channel(), only(2, {"": "embedding"}))
    table(indices).square().sum().backward()
    torch.testing.assert_close(table(indices), expected, **CLOSE)
    channel = world.channel()
    torch.testing.assert_close(table.weight.grad, parts.cuts["weight"].part(gradient, channel.rank, 2), **CLOSE)
    for wrong in (8, -1):
        with pytest.raises(IndexError):
            table(torch.tensor([0, wrong]))


def test_an_embedding_over_ranks(run_ranks):
    """Rows of another rank, the padding row, and an index out of range, which is an error on every rank."""
    run_ranks(2, _embeddings)

"""The collectives of split layers, in torch's graphs."""

from __future__ import annotations

import functools

import pytest
import torch
from problems import seeded
from split_models import GPT, Block, split, tokens

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

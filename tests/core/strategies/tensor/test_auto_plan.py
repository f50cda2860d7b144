"""Tensor-parallel plans that are derived automatically."""

from __future__ import annotations

import json

import pytest
import torch
from problems import seeded
from split_models import (
    GPT,
    WIDTH,
    FusedBlock,
    Recurrent,
    Residual,
    gpt,
    mlp,
    model_and_example,
    numbers,
    tokens,
)
from torch import nn

from nbdist.core.strategies.tensor import TensorPlan, derive_plan
from nbdist.errors import PlanError


def test_the_derived_plan_for_a_transformer():
    """Derived from dependencies: which columns feed which row, through which dropouts, norms and heads."""
    plan = derive_plan(gpt(), 2, (tokens(),))
    attention, gated = (group for group in plan.groups if group.block == "blocks.1")
    assert attention.layers == dict.fromkeys(["blocks.1.v", "blocks.1.k", "blocks.1.q"], "column") | {
        "blocks.1.o": "row"
    }
    assert (attention.divided, attention.dropouts) == (("blocks.1.h",), {"blocks.1.attention_dropout": -3})
    assert set(attention.partial) == {"blocks.1.q_norm.weight", "blocks.1.q_norm.bias"}
    assert (gated.kind, gated.dropouts) == ("mlp", {"blocks.1.inner_dropout": -1})
    assert {"head": "column_gather", "wte": "embedding"} in [group.layers for group in plan.groups]
    assert plan.reasons == {"wpe": "holds less than 1% of the parameters"}
    assert TensorPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_deriving_leaves_the_module_unchanged():
    """Modes, buffers, gradients, frozen weights and random states are unchanged."""
    model, example = model_and_example("residual")
    model.norm.eval()
    model.fc.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    derive_plan(model, 2, (example,))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), random)
    assert model.training
    assert not model.norm.training
    assert not model.fc.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layers_that_cannot_be_shared_evenly_stay_whole():
    """The automatic plan says why, with the sizes."""
    plan = derive_plan(seeded(mlp, torch.float64), 3, (numbers(4, 16),))
    assert plan.layers == {"5": "column", "7": "row"}
    assert plan.reasons["3"] == "has 32 inputs, which 3 ranks cannot share evenly"
    assert derive_plan(gpt(), 16, (tokens(),)).reasons["blocks.0.o"] == (
        "is split by itself, because it belongs to 8 heads (blocks.0.h), which 16 ranks cannot share evenly"
    )


@pytest.mark.parametrize(
    ("make", "example", "message"),
    [
        (lambda: Residual(5), lambda: numbers(2, 3, 6, 6), "fc has 5 outputs, which 4 ranks cannot share evenly"),
        (lambda: nn.LSTM(3, 4), lambda: numbers(5, 2, 3), ": the model itself is a LSTM, which is not"),
        (lambda: nn.Conv2d(3, 4, 3), lambda: numbers(2, 3, 6, 6), "is a Conv2d"),
    ],
)
def test_nothing_to_split(make, example, message):
    """One sentence: the layers, why each stays whole, and what to do."""
    with pytest.raises(PlanError, match=message) as caught:
        derive_plan(seeded(make, torch.float64), 4, (example(),))
    assert "Choose another tp degree or --strategy, or name the layers to split in a tensor plan." in str(caught.value)


def test_recurrent_models_split_around_their_core():
    """An LSTM stays whole and is named."""
    plan = derive_plan(seeded(Recurrent, torch.float64), 2, (tokens(),))
    assert plan.layers == {"embedding": "embedding", "head": "column_gather"}
    assert plan.reasons == {"lstm": "is a LSTM, which is not a kind of layer that can be split"}


def test_other_ways_to_split_a_fused_layer():
    """q, k and v side by side, or interleaved by head: only verification can tell which."""
    model = seeded(lambda: GPT(FusedBlock, tied=False), torch.float64)
    plan = derive_plan(model, 2, (tokens(),))
    ways = [
        group.sections["blocks.0.qkv"] for group in (*plan.groups, *plan.others) if "blocks.0.qkv" in group.sections
    ]
    assert list(dict.fromkeys(ways)) == [(WIDTH,) * 3, (3 * WIDTH,)]
    assert plan.others[-1].layers

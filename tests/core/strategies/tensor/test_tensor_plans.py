"""Tensor-parallel plans: derived automatically, written by the user, and verified numerically."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from problems import seeded
from split_models import (
    GPT,
    LENGTH,
    WIDTH,
    Block,
    FusedBlock,
    Recurrent,
    Residual,
    mlp,
    model_and_example,
    numbers,
    tokens,
)
from torch import nn

from nbdist.core.strategies.tensor import TensorPlan, derive_plan, parallelize, plan_from_rules, verify_plan
from nbdist.errors import PlanError

QKV = {"blocks.*.q": "column", "blocks.*.k": "column", "blocks.*.v": "column", "blocks.*.o": "row"}
MLP = {"blocks.*.gate": "column", "blocks.*.up": "column", "blocks.*.down": "row"}


def gpt(tied=True):
    return seeded(lambda: GPT(functools.partial(Block, 0.1), tied), torch.float64)


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
        (lambda: nn.LSTM(3, 4), lambda: numbers(5, 2, 3), r"it|is a LSTM, which is not a kind of layer"),
        (lambda: nn.Conv2d(3, 4, 3), lambda: numbers(2, 3, 6, 6), "is a Conv2d"),
    ],
)
def test_nothing_to_split(make, example, message):
    """One sentence: the layers, why each stays whole, and what to do."""
    with pytest.raises(PlanError, match=message) as caught:
        derive_plan(seeded(make, torch.float64), 4, (example(),))
    assert "Choose another tp degree or --strategy, or name the layers to split in a tensor plan." in str(caught.value)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"blocks.*.upp": "column"}, r"'blocks.\*.upp' matches no layer of GPT. Did you mean 'blocks.\d.up'\?"),
        ({"blocks.0.up": "collumn"}, "'collumn', which is not a kind: use one of .* Did you mean 'column'"),
        ({"blocks.*.n1": "column"}, "blocks.0.n1 is a LayerNorm, not a linear layer"),
        ({"head": "embedding"}, "head is a Linear, not a plain embedding"),
        ({"blocks.0.up": "column", "blocks.*.up": "row"}, "blocks.0.up is matched as 'column' and as 'row'"),
        ({"wpe": "embedding"}, "wpe has 6 rows, which 4 ranks cannot share evenly: leave it out"),
        ({"wte": "embedding"}, "wte.weight belongs to head and wte, but head is not split: name it too"),
        ({"blocks.*.heads": "heads"}, "matches no integer attribute"),
        ({"blocks.*.kv_groups": "heads"}, "blocks.0.kv_groups is 2, which 4 ranks cannot share evenly"),
        ({"blocks.*.down": "row"}, "blocks.0.down is a row, but its inputs come from blocks.0.up, which is no column"),
    ],
)
def test_mistakes_in_a_user_plan(rules, message):
    """Each message names the layer, the number and what to do; before anything is split."""
    with pytest.raises(PlanError, match=message):
        plan_from_rules(gpt(), 4, rules, (tokens(),))


def _verify_rules(world, rules):
    channel = world.channel()
    model = gpt(tied=False)
    return verify_plan(model, channel, plan_from_rules(model, channel.size, rules, (tokens(),)), (tokens(),))


def test_a_user_plan(run_ranks):
    """With the head count named, with attention derived automatically, and with other layers of each kind."""
    rules = {"wte": "embedding", "head": "column_gather", **MLP}
    by_hand = run_ranks(2, _verify_rules, {**QKV, "blocks.*.h": "heads", **rules})[0]
    assert len(by_hand.layers) == 2 * 7 + 2
    by_block = run_ranks(2, _verify_rules, {"blocks.?": "attention", **rules})[1]
    assert by_block.layers == by_hand.layers


@pytest.mark.parametrize("rules", [QKV, {"blocks.*.up": "column", "blocks.*.gate": "column"}])
def test_a_user_plan_that_changes_results(run_ranks, rules):
    """Heads that are cut through, and columns without a row, are found because results differ."""
    with pytest.raises(PlanError, match=r"the tensor plan changes what GPT computes: blocks\.0"):
        run_ranks(2, _verify_rules, rules)


class Functional(nn.Module):
    """Dropout functions, not modules: in torch's attention, between two layers, and outside of both."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.a, self.b = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        x = F.dropout(x, 0.1, self.training)
        q, k, v = (z.unflatten(-1, (-1, 8)).transpose(1, 2) for z in self.qkv(self.norm(x)).chunk(3, -1))
        p = 0.2 if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.o(out), 0.1, self.training)
        hidden = F.dropout(F.gelu(self.a(self.norm(x))), 0.3, self.training)
        return x + F.dropout(self.b(hidden), 0.1, self.training)


class Torn(nn.Module):
    """Wrong candidates: an output used twice, a weight read without its layer, a row with unsplit inputs."""

    def __init__(self):
        super().__init__()
        self.twice, self.after = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.read, self.table = nn.Linear(WIDTH, WIDTH, bias=False), nn.Embedding(8, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.good_a, self.good_b = nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x):
        hidden = self.twice(x)
        x = hidden + self.after(hidden.relu() * self.scale)
        x = x + self.read(x) @ self.read.weight
        x = x + self.table(torch.arange(LENGTH)) @ self.table.weight.T @ self.table.weight
        return x + self.good_b(self.good_a(x.tanh()).relu())


def _verify(world, make):
    channel = world.channel()
    model, example = seeded(make, torch.float64), numbers(3, LENGTH, WIDTH)
    plan = verify_plan(model, channel, derive_plan(model, channel.size, (example,)), (example,))
    parallelize(model, channel, plan).restore()
    return plan


def test_dropout_that_is_called_as_a_function(run_ranks):
    """Every rank draws what one process draws; calls are identified by their number."""
    plan = run_ranks(2, _verify, Functional)[0]
    assert plan.layers == {"qkv": "column", "o": "row", "a": "column", "b": "row"}


def test_verification_keeps_correct_groups(run_ranks):
    """Wrong candidates stay whole or are split layer by layer, with a reason; the correct one is kept."""
    plan = run_ranks(2, _verify, Torn)[0]
    assert {"good_a": "column", "good_b": "row"}.items() <= plan.layers.items()
    assert plan.layers.get("twice") in (None, "column_gather")
    assert {"read", "table"} <= plan.reasons.keys()
    assert not {"read", "table"} & plan.layers.keys()


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

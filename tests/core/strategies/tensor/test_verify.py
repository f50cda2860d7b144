"""Tensor-parallel plans are verified numerically, group by group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from problems import seeded
from split_models import (
    LENGTH,
    WIDTH,
    numbers,
)
from torch import nn

from nbdist.core.strategies.tensor import derive_plan, parallelize, verify_plan


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


def _verify(world, make, dtype=torch.float64):
    channel = world.channel()
    model, example = seeded(make, dtype), numbers(3, LENGTH, WIDTH).to(dtype)
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


class Normalized(nn.Module):
    """Norms, which magnify a rounding, and one layer that can be split."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(LENGTH, 8, 3, padding=1), nn.Conv1d(8, 8, 3, padding=1)
        self.norms, self.last = nn.ModuleList([nn.BatchNorm1d(8), nn.BatchNorm1d(8)]), nn.Linear(8 * WIDTH, 4)

    def forward(self, x):
        for convolve, norm in zip([self.first, self.second], self.norms, strict=True):
            x = norm(convolve(x)).relu()
        return self.last(x.flatten(1))


def test_in_half_precision_the_same_groups_are_kept(run_ranks):
    """Rounding is measured, by weights that are changed in their last bit; wrong candidates stay whole."""
    plan = run_ranks(2, _verify, Normalized, torch.bfloat16)[0]
    assert {"last"} == plan.layers.keys()
    assert not {"read", "table"} & run_ranks(2, _verify, Torn, torch.bfloat16)[0].layers.keys()

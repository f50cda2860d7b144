"""Split multi-head attention, with all of its options."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from problems import seeded
from split_models import BATCH, LENGTH, WIDTH, numbers, only
from torch import nn

from nbdist.core.strategies.tensor import parallelize

CLOSE = {"rtol": 0, "atol": 1e-10}


def _attentions(world):
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -2:] = True
    each = torch.arange(BATCH * 4 * LENGTH * LENGTH, dtype=torch.float64).sin().view(BATCH * 4, LENGTH, LENGTH)
    calls = [
        {}, {"average_attn_weights": False}, {"need_weights": False}, {"attn_mask": mask, "need_weights": False},
        {"attn_mask": mask, "is_causal": True, "need_weights": False}, {"key_padding_mask": padding, "attn_mask": mask},
        {"attn_mask": each}, {"key_padding_mask": padding, "need_weights": False},
    ]  # fmt: skip
    makes = [{}, {"batch_first": True}, {"batch_first": True, "dropout": 0.3, "bias": False}, {"kdim": 8, "vdim": 12}]
    for options in makes:
        for call in calls:
            results = []
            for split in (False, True):
                model = seeded(functools.partial(nn.MultiheadAttention, WIDTH, 4, **options), torch.float64)
                if split:
                    parallelize(model, world.channel(), only(2, {"": "attention"}))
                q = numbers(BATCH, LENGTH, WIDTH).requires_grad_()
                k, v = (q[..., : options[d]].clone() if d in options else q for d in ("kdim", "vdim"))
                inputs = [x if options.get("batch_first") else x.transpose(0, 1) for x in (q, k, v)]
                inputs = inputs if "kdim" in options else [inputs[0]] * 3
                torch.manual_seed(0)
                out, weights = model(*inputs, **call)
                (out * out.detach().cos()).sum().backward()
                results.append((F.dropout(out.detach(), 0.5), weights, q.grad))
            torch.testing.assert_close(*results, **CLOSE)
    alone = seeded(functools.partial(nn.MultiheadAttention, WIDTH, 4), torch.float64)
    x = numbers(LENGTH, WIDTH)
    expected = alone(x, x, x)
    parallelize(alone, world.channel(), only(2, {"": "attention"}))
    torch.testing.assert_close(alone(x, x, x), expected, **CLOSE)


def test_multihead_attention_with_all_options(run_ranks):
    """Masks, weights, layouts, widths of keys and values, dropout, and a sample without a batch."""
    run_ranks(2, _attentions)


def _causal_with_a_mask_elsewhere(world):
    """Outputs whole and split."""
    results = []
    for split in (False, True):
        make = functools.partial(nn.MultiheadAttention, WIDTH, 4, dropout=0.3, batch_first=True)
        model = seeded(make, torch.float64)
        if split:
            parallelize(model, world.channel(), only(2, {"": "attention"}))
        x = numbers(BATCH, LENGTH, WIDTH)
        mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device="meta")
        torch.manual_seed(0)
        results.append(model(x, x, x, attn_mask=mask, is_causal=True, need_weights=False)[0])
    return results


def test_of_a_causal_mask_only_the_hint_is_read(run_ranks):
    """As in one process, where a mask on the CPU of a model on a GPU is never looked at."""
    for whole, split in run_ranks(2, _causal_with_a_mask_elsewhere):
        torch.testing.assert_close(split, whole, **CLOSE)

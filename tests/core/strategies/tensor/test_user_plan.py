"""Tensor-parallel plans that a user writes."""

from __future__ import annotations

import pytest
from split_models import (
    gpt,
    tokens,
)

from nbdist.core.strategies.tensor import plan_from_rules, verify_plan
from nbdist.errors import PlanError

QKV = {"blocks.*.q": "column", "blocks.*.k": "column", "blocks.*.v": "column", "blocks.*.o": "row"}
MLP = {"blocks.*.gate": "column", "blocks.*.up": "column", "blocks.*.down": "row"}


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

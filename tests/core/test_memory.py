"""What a rank holds while it trains, against the formula of each mesh."""

from __future__ import annotations

import pytest
import torch
from problems import seeded, train
from torch import nn
from torch.nn import functional as F

from nbdist.core.params.placeholder import detached
from nbdist.core.strategies.shard import block as shard_block

WIDTH, LAYERS = 64, 8
P = LAYERS * WIDTH * WIDTH  # parameters
ADAM = 4  # numbers a parameter: itself, its gradient, two moments

# Numbers that a rank holds all the time, and those of the largest gathered block.
EXPECTED = {
    "dp=2": (ADAM * P, 0),
    "shard=2": (ADAM * P // 2, P // LAYERS),
    "shard=4": (ADAM * P // 4, P // LAYERS),
    "pp=2": (ADAM * P // 2, 0),
    "pp=4": (ADAM * P // 4, 0),
    "tp=2": (ADAM * P // 2, 0),
    "tp=4": (ADAM * P // 4, 0),
    "dp=2,pp=2": (ADAM * P // 2, 0),
    "dp=2,shard=2": (ADAM * P // 2, P // LAYERS),
    "dp=2,tp=2": (ADAM * P // 2, 0),
    "pp=2,tp=2": (ADAM * P // 4, 0),
    "shard=2,pp=2": (ADAM * P // 4, P // 2),
}


def layers():
    return nn.Sequential(*(part for _ in range(LAYERS) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())))


def held(world, mesh):
    """The most numbers held when the optimizer steps, and the most gathered at a time."""
    model, most, gathered, here = seeded(layers), [0], [0], set()

    def count(optimizer, _args, _kwargs):
        numbers = 0
        for parameter in model.parameters():
            state = [v for v in optimizer.state.get(parameter, {}).values() if v.ndim]
            tensors = [detached(parameter), *([] if parameter.grad is None else [parameter.grad]), *state]
            numbers += sum(t.untyped_storage().nbytes() // 4 if t.stride() == (0, 0) else t.numel() for t in tensors)
        most[0] = max(most[0], numbers)

    def rates(optimizer):
        optimizer.register_step_post_hook(count)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    gather, free = shard_block.Block.gather, shard_block.Block.free

    def noted_gather(block):
        gather(block)
        here.add(block)
        gathered[0] = max(gathered[0], sum(p.numel() for b in here for p in b.parameters))

    def noted_free(block):
        free(block)
        here.discard(block)

    shard_block.Block.gather, shard_block.Block.free = noted_gather, noted_free
    x = torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(0))
    more = {"microbatches": 2} if "pp" in mesh else {}
    train(world, model, (x, x), loss=F.mse_loss, optimizer=torch.optim.AdamW, lr_scheduler=rates, batch_size=16,
          steps=2, strategy=mesh, clip_norm=1.0, **more)  # fmt: skip
    return most[0], gathered[0]


@pytest.mark.parametrize("mesh", EXPECTED)
def test_a_rank_holds_what_the_formula_says(run_ranks, mesh):
    """Parameters, gradients and Adam's moments, to the number; eight dummies of one number each may be among them."""
    size = torch.tensor([int(part[-1]) for part in mesh.split(",")]).prod().item()
    for most, gathered in run_ranks(size, held, mesh):
        assert EXPECTED[mesh][0] <= most <= EXPECTED[mesh][0] + LAYERS
        assert EXPECTED[mesh][1] == gathered

"""Gradient all-reduce: flat buckets, weights, overlap with backward, and unused parameters."""

from __future__ import annotations

import pytest
import torch
from problems import FEATURES, SGD, alone, assert_same_bits, classes, mlp, seeded, strategy_of, train, weights
from torch import nn
from torch.nn import functional as F

from nbdist.core.comm import SoloChannel, hierarchical
from nbdist.core.comm.world import World
from nbdist.core.strategies import data_parallel
from nbdist.core.strategies.data_parallel import DataParallel
from nbdist.core.sync.agreement import ControlFlags
from nbdist.core.sync.bucketed_reducer import BucketedReducer

TINY_MIB = 2**-16  # 16 bytes: nearly every parameter has a bucket to itself


class Branches(nn.Module):
    """Two branches in two dtypes, and one that is never used; one parameter is too large for a single message."""

    def __init__(self):
        super().__init__()
        self.left, self.right, self.idle = (nn.Linear(FEATURES, 2) for _ in range(3))
        self.last = nn.Linear(2, 2, dtype=torch.float64)
        self.wide = nn.Linear(2, 40_000, bias=False)

    def forward(self, x, rank):
        hidden = (self.left if rank == 0 else self.right)(x)
        return self.last(hidden.double()) + self.wide(hidden).mean()


def unpack(totals):
    return totals.weight, totals.flags.commands, totals.flags.snapshot


def gradients(world, overlap, bucket_mib, accumulate):
    """Gradients and totals of two steps, the second with a rank that has no data."""
    model = seeded(Branches)
    strategy = strategy_of(DataParallel, world, model, full_batch=4, bucket_mib=bucket_mib, overlap=overlap)
    outcomes = []
    for step in range(2):
        strategy.begin_step()
        slices = range(0 if step and world.rank == 1 else accumulate)
        for i in slices:
            x = torch.full((2, FEATURES), 0.1 * (world.rank + 1) + i + step)
            loss = model(x, world.rank).square().mean()
            if i == accumulate - 1:
                strategy.reducer.expect_last()
            strategy.scale_loss(loss, 2).backward()
            strategy.reducer.losses.add(i, loss.detach(), 2, 2)
        totals = strategy.sync(ControlFlags(commands=world.rank == 1, snapshot=not slices))
        outcomes.append(({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}, totals))
    strategy.close()
    return outcomes


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_overlapping_with_backward_changes_no_bit(run_ranks, size, accumulate):
    """Many buckets that start while backward runs give what one flat sum at its end gives, in every dtype."""
    expected = run_ranks(size, gradients, False, 25.0, accumulate)
    for bucket_mib in (TINY_MIB, 25.0):
        for plain, overlapping in zip(expected, run_ranks(size, gradients, True, bucket_mib, accumulate), strict=True):
            assert [unpack(totals) for _, totals in plain] == [unpack(totals) for _, totals in overlapping]
            for step in range(2):
                assert_same_bits(
                    *({n: g for n, g in run[step][0].items() if g is not None} for run in (plain, overlapping))
                )


def beside(world, bucket_mib, accumulate):
    data_parallel.OVERLAP_ABOVE, hierarchical.FAST = 0, 1e30
    return gradients(world, None, bucket_mib, accumulate)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_over_hosts_sums_run_beside_backward(run_ranks, accumulate):
    """With the same bits, where only some ranks take a branch, and one has no data."""
    expected = run_ranks(3, gradients, False, 25.0, accumulate)
    for plain, overlapping in zip(
        expected, run_ranks(3, beside, TINY_MIB, accumulate, channel="three hosts"), strict=True
    ):
        assert [unpack(totals) for _, totals in plain] == [unpack(totals) for _, totals in overlapping]
        for step in range(2):
            assert_same_bits(
                *({n: g for n, g in run[step][0].items() if g is not None} for run in (plain, overlapping))
            )


def test_totals_of_a_step(run_ranks):
    """Weights and flags are summed over all ranks, and every rank gets the sums."""
    for outcomes in run_ranks(3, gradients, False, 25.0, 2):
        first, second = (totals for _, totals in outcomes)
        assert unpack(first) == (12.0, 1, 0)
        assert unpack(second) == (8.0, 1, 1)


def test_only_a_parameter_that_no_rank_used_has_no_gradient(run_ranks):
    """A parameter that one rank used has a gradient on all; an unused one has none, as in one process."""
    for outcomes in run_ranks(2, gradients, False, 25.0, 1):
        assert ["idle.weight", "idle.bias"] == [n for n, gradient in outcomes[0][0].items() if gradient is None]
        assert {"idle.weight", "idle.bias", "right.weight", "right.bias"} == {
            n for n, gradient in outcomes[1][0].items() if gradient is None
        }, "in the second step rank 1 had no data"


def branch_step(model, batch):
    x, y = batch
    return F.cross_entropy(model(x, int(y[0] != 0)), y.clamp(max=1))


def train_branches(world, accumulate):
    x, y = classes(24, torch.float32)
    return train(
        world, seeded(Branches), (x, y.sort().values), step=branch_step, optimizer=SGD, batch_size=8,
        accumulate=accumulate, shuffle=False,
    )[1]  # fmt: skip


def test_weight_decay_leaves_unused_parameters_alone(run_ranks):
    """Decay and momentum move a parameter just when they would in one process, whichever rank used it."""
    initial, expected = weights(seeded(Branches)), train_branches(World(), 2)
    assert_same_bits(expected, run_ranks(2, train_branches, 1)[1])
    assert torch.equal(initial["idle.weight"], expected["idle.weight"])
    assert not torch.equal(initial["left.weight"], expected["left.weight"])


def test_no_hook_and_no_gradient_remains():
    """After the run, backward allocates an ordinary gradient again."""
    model = mlp()
    reducer = BucketedReducer(list(model.parameters()), SoloChannel(torch.device("cpu")))
    reducer.begin()
    parameter = next(model.parameters())
    flat = parameter.grad
    reducer.close()
    assert parameter.grad is None
    model(classes(2)[0]).sum().backward()
    assert not flat.any()
    assert parameter.grad.any()


def test_gradients_have_the_strides_of_their_parameters():
    """A gradient has its parameter's strides, channels last included: otherwise torch is slower, and warns."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).to(memory_format=torch.channels_last)
    reducer = BucketedReducer(list(model.parameters()), SoloChannel(torch.device("cpu")))
    reducer.begin()
    assert [p.stride() for p in model.parameters()] == [p.grad.stride() for p in model.parameters()]
    model(torch.ones(1, 3, 8, 8)).sum().backward()
    expected = torch.autograd.grad(model(torch.ones(1, 3, 8, 8)).sum(), list(model.parameters()))
    assert all(torch.equal(gradient, p.grad) for gradient, p in zip(expected, model.parameters(), strict=True))
    reducer.close()


def awkward(dtype):
    model = nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 3))
    model[0].weight = nn.Parameter(torch.randn(FEATURES, FEATURES).t())  # not contiguous
    model[1].weight = model[0].weight  # tied
    model[0].bias.requires_grad_(False)  # frozen
    return model.to(dtype)


def train_awkward(world, dtype, accumulate):
    model = seeded(lambda: awkward(dtype))
    trained = train(world, model, classes(24, dtype), optimizer=SGD, batch_size=8, accumulate=accumulate)[1]
    return trained, model[0].weight is model[1].weight, model[0].weight.stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tied_frozen_and_transposed_parameters(run_ranks, dtype):
    """They train to the bits of one process and stay tied, frozen or transposed."""
    initial = weights(seeded(lambda: awkward(dtype)))
    expected, *_ = train_awkward(World(), dtype, 2)
    for trained, tied, stride in run_ranks(2, train_awkward, dtype, 1):
        assert_same_bits(expected, trained)
        assert tied
        assert stride == (1, FEATURES)
        assert torch.equal(initial["0.bias"], trained["0.bias"])
        assert not torch.equal(initial["1.bias"], trained["1.bias"])


@pytest.mark.parametrize("clip_norm", [0.05, 1e6])
def test_clipping_is_that_of_the_whole_batch(run_ranks, clip_norm):
    """The norm is that of the whole batch's gradient: two ranks update the weights as torch does with one batch."""
    x, y = classes(16)
    model = mlp()
    optimizer = SGD(model.parameters())
    F.cross_entropy(model(x), y).backward()
    nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    for trained in run_ranks(2, train_clipped, clip_norm):
        torch.testing.assert_close(trained, weights(model), rtol=1e-12, atol=1e-12)


def train_clipped(world, clip_norm):
    return train(world, mlp(), classes(16), optimizer=SGD, batch_size=16, shuffle=False, clip_norm=clip_norm)[1]


def test_one_rank_equals_a_plain_loop():
    """On one rank with one slice the weights are those of a plain loop, bit for bit."""
    x, y = classes(16, torch.float32)
    model = mlp(torch.float32)
    optimizer = SGD(model.parameters())
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    trained = alone(mlp(torch.float32), (x, y), optimizer=SGD, batch_size=16, shuffle=False)[1]
    assert_same_bits(weights(model), trained)

"""Data parallel replicas: the broadcast at the start, and BatchNorm and other buffers across ranks."""

from __future__ import annotations

import math

import pytest
import torch
from problems import FEATURES, SGD, alone, assert_same_bits, classes, seeded, strategy_of, train, weights
from torch import nn

from nbdist.core.comm.world import World
from nbdist.core.strategies.data_parallel import DataParallel

NEVER = torch.finfo(torch.float32).min


class Normed(nn.Module):
    """A model with running statistics, constant buffers, and a non-persistent one."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.register_buffer("mask", torch.tensor([0.0, NEVER, -math.inf, 0.1, 1 / 3]))
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long), persistent=False)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu())


def differing(world):
    """Every rank starts with other weights and buffers."""
    model = seeded(Normed)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.detach().add_(world.rank)
    strategy_of(DataParallel, world, model).close()
    return weights(model), model.steps


def test_weights_of_rank_zero_are_broadcast(run_ranks):
    """Weights and buffers of rank 0 are broadcast, non-persistent ones too."""
    for tensors, steps in run_ranks(3, differing):
        assert_same_bits(weights(seeded(Normed)), tensors)
        assert 0 == steps.item()


def train_normed(world, batch_size, samples, accumulate=1, optimizer=SGD):
    return train(
        world, seeded(Normed), classes(samples, torch.float32), optimizer=optimizer, batch_size=batch_size,
        accumulate=accumulate, shuffle=False,
    )  # fmt: skip


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_batch_norm_trains_on_local_statistics(run_ranks, ranks):
    """In training BatchNorm normalizes its own slice, as one process with accumulation does: weights are the same."""
    _, expected = train_normed(World(), 12, 36, accumulate=ranks)
    for _, trained in run_ranks(ranks, train_normed, 12, 36):
        for name, tensor in expected.items():
            if "running" not in name and "tracked" not in name:
                assert torch.equal(tensor, trained[name]), name


@pytest.mark.parametrize("ranks", [2, 3])
def test_running_statistics_are_the_mean_over_the_replicas(run_ranks, ranks):
    """Each replica tracks its own slices; the trained model has the mean, the same bits on every rank."""
    x, _ = classes(36, torch.float32)
    replicas = [seeded(Normed) for _ in range(ranks)]
    for batch in x.split(12):
        for replica, part in zip(replicas, batch.chunk(ranks), strict=True):
            replica(part)
    results = [trained for _, trained in run_ranks(ranks, train_normed, 12, 36, 1, standing_still)]
    for name in ("norm.running_mean", "norm.running_var"):
        expected = torch.stack([replica.state_dict()[name] for replica in replicas]).mean(0)
        torch.testing.assert_close(results[0][name], expected, rtol=1e-6, atol=1e-6)
    assert 3 == results[0]["norm.num_batches_tracked"]
    for other in results[1:]:
        assert_same_bits(results[0], other)


def standing_still(parameters):
    """Leaves the parameters unchanged, so that only running statistics change."""
    return torch.optim.SGD(parameters, lr=0.0)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_constant_buffers_stay_to_the_bit(run_ranks, ranks):
    """Masks and tables are returned unchanged: no rounding of a mean, and no overflow of its sum."""
    for _, trained in run_ranks(ranks, train_normed, 12, 24):
        assert torch.equal(seeded(Normed).mask, trained["mask"])


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_short_last_batch_gives_no_slice_of_one(run_ranks, ranks):
    """BatchNorm cannot train on a single sample; a last batch of 3 runs on any number of ranks."""
    result, _ = run_ranks(ranks, train_normed, 2 * ranks, 2 * ranks + 3)[0]
    assert 2 * ranks + 3 == result.history[0]["samples"]


def test_modules_in_evaluation_mode_stay_in_it():
    """A BatchNorm that the user froze keeps its statistics, and every module the mode it had."""
    model = seeded(Normed)
    model.norm.eval()
    before = weights(model)
    trained = alone(model, classes(12, torch.float32), optimizer=SGD, batch_size=6)[1]
    assert torch.equal(before["norm.running_mean"], trained["norm.running_mean"])
    assert [True, True, False, True] == [module.training for module in model.modules()]


def test_modules_get_their_modes_back_after_training():
    """Training sets train mode and gives each module its mode back."""
    model = seeded(Normed).eval()
    model.last.train()
    before = weights(model)
    trained = alone(model, classes(12, torch.float32), optimizer=SGD, batch_size=6)[1]
    assert not torch.equal(before["norm.running_mean"], trained["norm.running_mean"])
    assert [False, False, False, True] == [module.training for module in model.modules()]

"""Sums beside the computation: their bits, beside other collectives, and their end with the world."""

from __future__ import annotations

import threading

import pytest
import torch
from problems import SGD, assert_same_bits, classes, losses, seeded, train
from torch import nn

from nbdist.core.comm import comm_timer, hierarchical
from nbdist.core.comm.background_channel import BackgroundChannel
from nbdist.core.strategies import data_parallel
from nbdist.errors import PeerLostError

HOSTS = ["two hosts", "three hosts"]


def slow(world):
    """The channel beside the world's, as over a slow network."""
    hierarchical.FAST = 1e30
    return world.channel().beside()


def fast(world):
    hierarchical.FAST = 0.0
    return world.channel().beside() is world.channel()


def test_over_a_fast_network_there_is_none(run_ranks):
    """All ranks agree, whatever each has measured; nor is there one on a single host."""
    assert [True] * 3 == run_ranks(3, fast, channel="two hosts")
    assert [True] * 2 == run_ranks(2, fast)


def sums_beside_others(world):
    """Of many sizes; ranks do other collectives in between, at other moments."""
    channel, beside = world.channel(), slow(world)
    assert isinstance(beside, BackgroundChannel)
    assert world.channel().beside() is beside
    tensors = [torch.full((length,), float(world.rank + 1), dtype=torch.float64) for length in (1, 300_000, 7, 40_000)]
    flat = beside.zeros(5000, torch.float64)
    flat += world.rank
    started = []
    for number, tensor in enumerate([*tensors, flat]):
        started.append(beside.start_all_reduce_(tensor))
        if number == world.rank:
            channel.all_reduce_(torch.ones(3))
    before = comm_timer.waiting
    for each in started:
        each.wait()
    waited = comm_timer.waiting - before
    found = [tensor.clone() for tensor in (*tensors, flat)]
    beside.free(flat)
    return found, waited


@pytest.mark.parametrize("hosts", HOSTS)
def test_sums_run_beside_other_collectives(run_ranks, hosts):
    """In the order in which they were started; their waits are not counted as this thread's."""
    for found, waited in run_ranks(3, sums_beside_others, channel=hosts):
        assert [6.0] * 4 + [3.0] == [tensor.unique().item() for tensor in found]
        assert 0.0 == waited


def one_leaves(world):
    """The last rank leaves; the others wait for a sum with it."""
    beside = slow(world)
    flat = beside.zeros(1000, torch.float32)
    world.channel().all_reduce_(torch.ones(1))
    if world.rank == world.size - 1:
        return ""
    pending = beside.start_all_reduce_(flat)
    try:
        pending.wait()
    except PeerLostError as error:
        beside.free(flat)
        return str(error)


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_rank_that_leaves_ends_the_wait(run_ranks, hosts):
    """With the error of any collective."""
    *others, last = run_ranks(3, one_leaves, channel=hosts)
    assert "" == last
    assert all("another rank is gone" in error for error in others)


def leaves_in_the_middle(world):
    """Rank 0 starts a sum that no other does, and frees its memory, as after an error in a step."""
    beside = slow(world)
    flat = beside.zeros(1000, torch.float32)
    if world.rank == 0:
        pending = beside.start_all_reduce_(flat)
        beside.free(flat)
        with pytest.raises(PeerLostError):
            pending.wait()
    return [thread.name for thread in threading.enumerate() if "sums" in thread.name]


def test_memory_is_freed_only_when_the_thread_has_ended(run_ranks):
    """Which would write to it."""
    assert [[], ["nbdist-sums"]] == run_ranks(2, leaves_in_the_middle, channel="two hosts")


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 3))

    def forward(self, x):
        return self.layers(x)


def trained(world, above):
    """Batch norm's own collectives run in backward, between the buckets."""
    data_parallel.OVERLAP_ABOVE, hierarchical.FAST = above, 1e30
    options = {"optimizer": SGD, "batch_size": 12, "epochs": 2, "sync_batchnorm": True, "bucket_mib": 1e-4}
    result, weights = train(world, seeded(Normed, torch.float64), classes(30), **options)
    return losses(result), weights


@pytest.mark.parametrize("hosts", HOSTS)
def test_a_training_has_the_same_bits(run_ranks, hosts):
    """Synchronized batch norm included."""
    for (before, plain), (after, beside) in zip(
        run_ranks(3, trained, 1 << 40, channel=hosts), run_ranks(3, trained, 0, channel=hosts), strict=True
    ):
        assert before == after
        assert_same_bits(plain, beside)

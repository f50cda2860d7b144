"""Ranks of three hosts and more; 64 are on hosts that are only called so."""

from __future__ import annotations

import os

import pytest
import torch
from small_training import DATA, OPTIONS, bits, model

import nbdist

RANKS = 64


def work(world):
    """Each rank's sum, its part of a reduce-scatter, and with how many ranks it is connected."""
    channel = world.channel()
    total, part = torch.full((1000,), float(world.rank + 1)), torch.ones(RANKS)
    channel.all_reduce_(total)
    peers = len(channel._shared._peers) + (0 if channel._chain is None else len(channel._chain._peers))
    return total.unique().tolist(), channel.reduce_scatter(part).tolist(), peers


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="64 ranks on one core take minutes")
def test_64_ranks_on_8_hosts(run_ranks):
    """A rank talks to the seven others of its host, and a leader to one or two more: linear in the ranks."""
    results = run_ranks(RANKS, work, channel="eight hosts")
    total = float(sum(range(1, RANKS + 1)))
    assert [([total], [float(RANKS)])] * RANKS == [(sums, part) for sums, part, _ in results]
    assert max(peers for _, _, peers in results) == 7 + 2


def test_three_hosts_of_one_rank_give_the_bits_of_one(network):
    """Whose sums nobody adds in shared memory."""
    found = []
    for hosts in ({"local": 3}, {"h1": 1, "local": 1, "h2": 1}):
        with nbdist.Cluster(hosts=hosts, device="cpu", spares=0) as cluster:
            cluster.train(trained := model(), DATA, strategy="dp=3", loss="mse", epochs=4, **OPTIONS)
        found.append(bits(trained))
    assert found[0] == found[1]

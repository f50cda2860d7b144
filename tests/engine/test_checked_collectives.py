"""Checked collectives: one that lacks ranks raises."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from nbdist.engine import checked_collectives
from nbdist.errors import ClusterError


def refused(world):
    pair = dist.new_group([0])
    original = dist.all_reduce
    tensor = torch.ones(1)
    if world.rank == 0:
        checked_collectives.allow_only([0])
        from torch.distributed import broadcast

        with pytest.raises(
            ClusterError,
            match=r"^all_reduce is a collective: it waits for rank 1 too, and this cell runs on rank 0 only",
        ):
            dist.all_reduce(tensor)
        with pytest.raises(ClusterError, match=r"new_group is a collective"):
            dist.new_group([0])
        with pytest.raises(ClusterError, match=r"broadcast is a collective"):
            broadcast(tensor, 0)
        dist.all_reduce(tensor, group=pair)
        checked_collectives.allow_all()
        checked_collectives.allow_all()
    else:
        from torch.distributed import broadcast
    assert dist.all_reduce is original
    broadcast(tensor, 0)
    dist.all_reduce(tensor)
    return tensor.item()


def test_a_collective_that_lacks_ranks_raises_until_all_are_allowed(run_ranks):
    """Collectives of a group of allowed ranks work, and functions imported meanwhile work afterwards."""
    assert [2.0, 2.0] == run_ranks(2, refused)

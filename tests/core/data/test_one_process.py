"""As one process: what reads for all ranks sees no other ones, and they are there again afterwards."""

from __future__ import annotations

import os

import pytest
import torch.distributed as dist

from nbdist.core.data.one_process import AsOneProcess


def seen(world):
    os.environ.update(RANK=str(world.rank), WORLD_SIZE=str(world.size))
    os.environ.pop("LOCAL_RANK", None)

    def asked():
        return (
            dist.is_initialized(), dist.get_rank(), dist.get_world_size(), os.environ["RANK"], os.environ["WORLD_SIZE"],
            "LOCAL_RANK" in os.environ,
        )  # fmt: skip

    with AsOneProcess():
        inside = asked()
    return inside, asked()


def test_other_ranks_are_hidden(run_ranks):
    """From the environment and from torch; what is not set stays so."""
    expected = [((False, 0, 1, "0", "1", False), (True, rank, 2, str(rank), "2", False)) for rank in range(2)]
    assert expected == run_ranks(2, seen)


def fails(world):
    with pytest.raises(KeyError), AsOneProcess():
        raise KeyError
    return dist.get_world_size()


def test_an_error_shows_them_again(run_ranks):
    """Collectives go on."""
    assert [2, 2] == run_ranks(2, fails)

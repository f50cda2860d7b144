"""The feed: what rank 0 reads reaches the others as it was."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import torch

from nbdist.core.data.feed import Feed
from nbdist.errors import PeerLostError

Pair = collections.namedtuple("Pair", "x y")


def made():
    """Objects of many kinds, of which one holds a tensor twice."""
    shared = torch.arange(6.0).view(2, 3)
    local = type("Local", (), {"__eq__": lambda self, other: vars(self) == vars(other), "__hash__": None})
    item = local()
    item.n = 3
    return {
        "views": shared[:, 1:], "empty": torch.empty(0, 2), "half": torch.ones(3, dtype=torch.bfloat16), "none": None,
        "pair": Pair(shared, shared), "array": np.arange(3), "texts": ["a", "b"], "sparse": torch.eye(2).to_sparse(),
        "flags": torch.tensor([True, False]), "key": torch.tensor(2), "local": item,
    }  # fmt: skip


def receive_all(world):
    feed = Feed(world, range(world.size))
    value = feed.share(made)
    own = [feed.share(lambda step=step: step) for step in range(3)]
    mine = 0 if feed.is_first else None
    if feed.is_first:
        feed.send(lambda place: 10 * place)
    else:
        mine = feed.receive()
    world.channel().all_reduce_(torch.ones(1))
    feed.close()
    expected = made()
    for name, one in expected.items():
        if isinstance(one, torch.Tensor):
            torch.testing.assert_close(value[name], one, rtol=0, atol=0)
    assert value["pair"].x is value["pair"].y
    assert expected["array"].tolist() == value["array"].tolist()
    assert (None, ["a", "b"], 3) == (value["none"], value["texts"], value["local"].n)
    return own, mine


@pytest.mark.parametrize("channel", ["shared memory", "process group"])
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_has_what_rank_0_made(run_ranks, size, channel):
    """Tensors and objects of any kind, in order; to each place its own."""
    assert [([0, 1, 2], 10 * rank) for rank in range(size)] == run_ranks(size, receive_all, channel=channel)


def forge(world):
    feed = Feed(world, range(world.size))
    if feed.is_first:
        feed._secret = b"another"
        feed.send(lambda _place: 3)
        world.channel().all_reduce_(torch.ones(1))
        return "sent"
    try:
        return feed.receive()
    except PeerLostError as error:
        return str(error)
    finally:
        world.channel().all_reduce_(torch.ones(1))


def test_a_message_that_the_worlds_secret_has_not_signed_is_not_unpickled(run_ranks):
    """Process groups are not authenticated."""
    assert ["sent", "a message about the data is not rank 0's: its signature is wrong."] == run_ranks(2, forge)


def test_one_process_feeds_itself():
    """Without a link."""
    feed = Feed()
    assert feed.is_first
    assert 3 == feed.share(lambda: 3)

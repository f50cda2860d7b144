"""`waiting_calls` lists every function in which a rank waits for others."""

from __future__ import annotations

import sys

import pytest

from nbdist.core.comm import HierarchicalChannel, ProcessGroupChannel, SharedMemoryChannel, peer_sockets
from nbdist.core.comm.blocking_calls import waiting_calls
from nbdist.core.comm.channel import Channel


@pytest.mark.parametrize("kind", [SharedMemoryChannel, ProcessGroupChannel, HierarchicalChannel])
def test_the_collectives_of_every_channel_are_known(kind):
    """Decorated methods too, by their own names."""
    known = {name for file, name in waiting_calls() if file == sys.modules[kind.__module__].__file__}
    own = {"start_all_reduce_", "start_broadcast_", "all_gather", "reduce_scatter"}
    assert own <= known


def test_what_strategies_and_handshakes_wait_in_is_known_too():
    """Shared weights call a channel's barrier directly; ranks wait in `connect` for a peer that does not come."""
    file = sys.modules[SharedMemoryChannel.__module__].__file__
    expected = {(file, "barrier"): "barrier", (peer_sockets.__file__, "connect"): "connect"}
    assert expected.items() <= waiting_calls().items()


def test_what_only_hands_out_memory_is_none():
    """A rank in such a function is not waiting."""
    names = {name for _, name in waiting_calls()}
    assert names.isdisjoint({"zeros", "free", "close", "common", "slabs", "groups", "__init__"})
    assert {"zeros", "free", "close"} <= set(vars(Channel))

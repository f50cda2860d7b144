"""Snapshots of ranks on several hosts."""

from __future__ import annotations

import contextlib
import types

from nbdist.cluster.hosts.host import HostFacts
from nbdist.cluster.hosts.local_host import LocalHost
from nbdist.cluster.runs.host_snapshots import HostSnapshots


def test_ranks_that_are_added_meanwhile_have_none_yet(tmp_path):
    """The thread that copies snapshots looks at all engines, also before the store has grown: it goes on."""
    host = LocalHost(HostFacts(name="h1", host_id="1", cores=1), tmp_path, "")
    engines = types.SimpleNamespace(size=2, anchor=None, ended=False, hosts=[host], by_host=lambda: {host: [0, 1, 2]})
    with contextlib.closing(HostSnapshots(engines)) as store:
        assert 2 == len(store.paths_on(host))
        store.refresh()
        assert store.newest is None
        store.grow(3)
        assert 3 == len(store.paths_on(host))
        store.refresh()

"""A start of engines that fails."""

from __future__ import annotations

import threading

import psutil
import pytest
from shared_cluster import HUNG_S

from nbdist.cluster.engines.starting import start_engines
from nbdist.cluster.hosts.host_choice import LOCAL, HostChoice
from nbdist.errors import ClusterError

pytestmark = pytest.mark.engines


def test_a_start_that_fails_at_once_leaves_nothing(shared_cluster, monkeypatch):
    """Not even the store's process, which is started meanwhile, as long as a caller keeps the error."""

    def fail(*_):
        raise ClusterError("no controller")

    monkeypatch.setattr("nbdist.cluster.engines.starting.Launch", fail)
    before, threads = set(psutil.Process().children()), {*threading.enumerate()}
    with pytest.raises(ClusterError, match="no controller") as caught:
        start_engines(HostChoice(engines={LOCAL: 2}), "cpu", HUNG_S, lambda words: None)
    for thread in {*threading.enumerate()} - threads:
        thread.join()
    assert before == set(psutil.Process().children()), caught

"""An ipyparallel cluster that the user has started: its hosts are used, and its engines stay as they are."""

from __future__ import annotations

import os

import pytest
from shared_cluster import until
from small_training import DATA, OPTIONS, hosts_of, model

import nbdist
from nbdist.errors import PlanError


@pytest.fixture
def users(network, _users):
    """The user's cluster, whose engines are left as they were."""
    _users.start_engines()
    _users.client[:].push({"mine": 7}, block=True)
    engines, pids = list(_users.client.ids), _users.client[:].apply_sync(os.getpid)
    yield _users
    if engines == _users.client.ids:  # no host has crashed
        assert _users.client[:].pull("mine", block=True) == [7] * len(pids)
        assert _users.client[:].apply_sync(os.getpid) == pids


def test_the_hosts_of_a_profile_and_some_of_them(users, monkeypatch, tmp_path):
    """As many engines as it has there, or as are asked for; unknown hosts are named."""
    (tmp_path / "profile_users").symlink_to(users.file.parent.parent)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    for options, hosts in (
        ({"profile": "users"}, "h1 h1 h2 h2"),
        ({"profile": "users", "engines": 3}, "h1 h1 h2"),
        ({"profile": "users", "hosts": {"h2": 1}}, "h2"),
    ):
        with nbdist.Cluster(device="cpu", spares=0, **options) as cluster:
            assert hosts.split() == hosts_of(cluster)
            cluster.train(model(), DATA, loss="mse", epochs=1, **OPTIONS)
    with pytest.raises(PlanError, match=r"host h3 is none of the cluster's: h1, h2"):
        nbdist.Cluster(profile="users", hosts={"h3": 1}).start()


def test_a_host_of_a_running_cluster_that_is_back_is_used_again(users, network):
    """Through an engine that has another number then."""
    with nbdist.Cluster(device="cpu", connect=str(users.file)) as cluster:
        network.crash("h2")
        until(lambda: [2, 3] == [engine.rank for engine in cluster.engines if engine.state == "lost"])
        network.mend()
        users.start_engines()
        until(lambda: ["h1", "h1", "h2", "h2"] == hosts_of(cluster.start()))

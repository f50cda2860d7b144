"""What tests over several hosts share. `make test-hosts` runs them, on the head of a `host_network`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

import slurm_hosts
from host_network import CONTROL_VARIABLE, HostNetwork
from shared_cluster import until
from small_training import hosts_of
from users_cluster import UsersCluster

import nbdist
from nbdist.cluster.hosts.fork_client import end_server, require_server
from nbdist.cluster.hosts.waiting_hosts import end_hosts


def pytest_configure(config: pytest.Config) -> None:
    """On a network of its own each worker has a /tmp of its own, without the folder of the one that started it."""
    if config.option.basetemp:
        Path(config.option.basetemp).parent.mkdir(parents=True, exist_ok=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder are marked, and left out where there are no hosts."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser if "panel" in item.path.name else pytest.mark.hosts)
            if CONTROL_VARIABLE not in os.environ:
                item.add_marker(pytest.mark.skip(reason="needs hosts: make test-hosts"))


@pytest.fixture(scope="session", autouse=True)
def _fork_server() -> Iterator[None]:
    """One for all tests: each cluster of theirs begins with it, and none ends it."""
    require_server()
    yield
    end_hosts()
    end_server()
    assert not [child for child in psutil.Process().children() if child.name() == "ssh"]


@pytest.fixture
def network() -> Iterator[HostNetwork]:
    """The hosts, whole again after the test. Agents may wait there: starting them takes most of a test's time."""
    hosts = HostNetwork(os.environ[CONTROL_VARIABLE])
    hosts.mend()
    yield hosts
    hosts.mend()


@pytest.fixture
def cluster(network: HostNetwork, _cluster: nbdist.Cluster) -> nbdist.Cluster:
    """The `_cluster` that the tests of a file share, two engines on each of two hosts: one wherever one belongs."""
    until(lambda: hosts_of(_cluster.start()) == ["h1", "h1", "h2", "h2"])
    return _cluster


@pytest.fixture
def no_agents(network: HostNetwork) -> None:
    """Nothing of ours is on the hosts yet."""
    end_hosts()
    until(lambda: not any(network.processes(host) for host in network.names))


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that all hosts see."""
    with tempfile.TemporaryDirectory(prefix=".shared-", dir=Path(__file__).parent) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def _users() -> Iterator[UsersCluster]:
    """A cluster of the user's, two engines on each of two hosts."""
    with tempfile.TemporaryDirectory(prefix=".shared-", dir=Path(__file__).parent) as folder:
        users = UsersCluster(HostNetwork(os.environ[CONTROL_VARIABLE]), Path(folder), ["h1", "h2"], each=2)
        try:
            users.up()
            yield users
        finally:
            users.down()


@pytest.fixture(scope="module")
def _slurm():
    if not slurm_hosts.installed():
        pytest.skip("Slurm is NOT tested: it is not installed")
    slurm = slurm_hosts.SlurmHosts(HostNetwork(os.environ[CONTROL_VARIABLE]))
    slurm.up()
    yield slurm
    slurm.down()


@pytest.fixture
def slurm(network, _slurm, monkeypatch):
    """Slurm, of which every host but this one is a node; all are idle. Nothing that asked for a job is left."""
    monkeypatch.setenv("SLURM_CONF", slurm_hosts.CONF)
    _slurm.start_nodes()
    yield _slurm
    until(lambda: not slurm_hosts.asking())

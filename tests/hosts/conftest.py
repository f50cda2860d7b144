"""What tests over several hosts share. `make test-hosts` runs them, on the head of a `host_network`."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from host_network import CONTROL_VARIABLE, HostNetwork

from nbdist.cluster.hosts.fork_client import end_server, require_server
from nbdist.cluster.hosts.waiting_hosts import end_hosts


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
    end_server()


@pytest.fixture
def network() -> Iterator[HostNetwork]:
    """The hosts, whole again after the test, without agents that wait."""
    end_hosts()  # those of a cluster of a module's tests
    hosts = HostNetwork(os.environ[CONTROL_VARIABLE])
    hosts.mend()
    yield hosts
    hosts.mend()
    end_hosts()


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that all hosts see."""
    with tempfile.TemporaryDirectory(prefix=".shared-", dir=Path(__file__).parent) as folder:
        yield Path(folder)

"""Fixtures of the cluster's tests."""

from __future__ import annotations

import pytest

from nbdist import last_run


@pytest.fixture
def records(home):
    """The folder in which the engines keep the records of this test."""
    return home / "runs"


@pytest.fixture
def untouched(cluster, records):
    """Fails the test if it made the engines do anything: a run, a record, a new world."""
    world = "import torch.distributed; print(id(torch.distributed.group.WORLD))"

    def look():
        cell = cluster.execute(world)
        cell.wait()
        return cell.printed(), set(records.glob("*")), last_run(), [engine.pid for engine in cluster.engines]

    before = look()
    yield
    assert look() == before

"""Fixtures of the cluster's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdist import last_run


@pytest.fixture
def records(cluster):
    """The folder in which the engines keep their records."""
    cell = cluster.execute("import os; print(os.environ['NBDIST_HOME'])", [0])
    cell.wait()
    return Path(cell.printed()[0].strip()) / "runs"


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

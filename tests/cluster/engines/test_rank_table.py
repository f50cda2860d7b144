"""The rank table: an engine whose process has ended is dead, whoever has failed to report that."""

from __future__ import annotations

import os
import signal

import pytest
from shared_cluster import HUNG_S, until

from nbdist.cluster.calls.pending_call import EngineDied
from nbdist.cluster.engines.starting import start_engines
from nbdist.cluster.hosts.host_choice import LOCAL, HostChoice

pytestmark = pytest.mark.engines


@pytest.fixture
def engines(shared_cluster):
    """Two engines of the test's own, without a spare."""
    started = start_engines(HostChoice(engines={LOCAL: 2}), "cpu", HUNG_S, lambda words: None)
    yield started
    started.end()


def test_calls_of_an_ended_engine_fail_although_the_controller_reports_nothing(engines):
    controller = engines._launch._cluster.controller.process
    call = engines.start_cell(1, "import time; time.sleep(1e6)")
    os.kill(controller.pid, signal.SIGSTOP)
    try:
        os.kill(engines.records()[1].pid, signal.SIGKILL)
        until(lambda: engines.check_alive() or call.done())
        assert isinstance(call.exception(), EngineDied)
        with pytest.raises(Exception, match="rank 1: the engine's process has ended"):
            engines.start_call(1, "ping")
    finally:
        os.kill(controller.pid, signal.SIGCONT)
    assert [1] == engines.lost

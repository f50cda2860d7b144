"""A launch: processes and the client that is connected to them."""

from __future__ import annotations

import threading

import pytest
import zmq
from shared_cluster import HUNG_S, pids_of, until

from nbdist.cluster.launch.launcher import Launch


@pytest.fixture
def launch():
    """One engine of the test's own."""
    launched = Launch(1)
    yield launched
    launched.end()


def test_an_engine_that_registers_while_the_client_connects_is_found(launch):
    """A client that has missed the notice of an engine hears of it no more; the wait for it ends all the same."""
    launch.wait_for(1, HUNG_S, lambda text: None)
    deaf = launch.client._client
    done = threading.Event()

    def unsubscribe():
        deaf._notification_socket.setsockopt(zmq.UNSUBSCRIBE, b"")
        done.set()

    deaf._io_loop.add_callback(unsubscribe)  # sockets belong to the client's own thread
    assert done.wait(HUNG_S)
    launch.add(1)
    until(lambda: len(deaf.queue_status()) == 3)  # two engines, and "unassigned"
    assert len(deaf.ids) == 1
    launch.wait_for(2, HUNG_S, lambda text: None)
    assert len(launch.client.ids) == 2
    pids = [launch.client.start_call(engine, "ping") for engine in launch.client.ids]
    assert pids_of(launch) == {pid.result(HUNG_S) for pid in pids}

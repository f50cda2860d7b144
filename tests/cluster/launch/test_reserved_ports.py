"""Reserved ports: nobody gets them by chance, and ZeroMQ binds them by number."""

from __future__ import annotations

import contextlib
import socket
import sys

import pytest
import zmq

from nbdist.cluster.launch.reserved_ports import ReservedPorts
from nbdist.errors import ClusterError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux reserves ports in this way")


@pytest.fixture
def port():
    with contextlib.closing(ReservedPorts([0])) as reserved:
        yield reserved.numbers[0]


def test_who_asks_for_any_port_does_not_get_it(port):
    """Neither a listener nor the own end of a connection; asked for by number, it is in use."""
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))


def test_a_number_that_is_taken_is_one_sentence(port):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        taken = other.getsockname()[1]
        with pytest.raises(ClusterError, match=f"port {taken} of --ports cannot be used here .Address already in use"):
            ReservedPorts([taken])


def test_zeromq_binds_and_is_reached_there(port):
    with zmq.Context() as context, context.socket(zmq.REP) as server, context.socket(zmq.REQ) as client:
        server.bind(f"tcp://127.0.0.1:{port}")
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"x")
        assert server.recv() == b"x"
        for end in (server, client):
            end.linger = 0


def test_a_controller_uses_them(cluster):
    """All of its sockets, or one could still be taken."""
    launch = cluster._up._launch
    reserved, info = set(launch._ports.numbers), launch._cluster.controller
    ports = {
        port
        for process in _with_children(info.process)
        for port in _listening(process)
    }  # fmt: skip
    assert ports
    assert ports <= reserved


def _with_children(process):
    return [process, *process.children(recursive=True)]


def _listening(process):
    return [each.laddr.port for each in process.net_connections("tcp") if each.status == "LISTEN"]

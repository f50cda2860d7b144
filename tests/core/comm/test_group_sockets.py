"""The sockets of process groups: found, kept alive, and shut without touching any other."""

from __future__ import annotations

import contextlib
import socket
import sys

import pytest

from nbdist.core.comm.group_sockets import keeping_alive, noting_group_sockets, shut_connections

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/fd")


@pytest.fixture
def connect():
    """Connects two sockets of two addresses of this host; returns the listener, the client and the server's end."""
    with contextlib.ExitStack() as opened:

        def connected() -> tuple[socket.socket, socket.socket, socket.socket]:
            listener = opened.enter_context(socket.create_server(("127.0.0.2", 0)))
            client = opened.enter_context(socket.create_connection(listener.getsockname()))
            return listener, client, opened.enter_context(listener.accept()[0])

        yield connected


def user_timeout_ms(peer: socket.socket) -> int:
    return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_connections_that_are_made_within_are_kept_alive_and_others_not(connect):
    _, before, _ = connect()
    with keeping_alive():
        _, within, _ = connect()
    _, after, _ = connect()
    assert [user_timeout_ms(peer) for peer in (before, within, after)] == [0, 3000, 0]


def test_shutting_ends_connections_of_groups_and_leaves_listeners_and_others(connect):
    _, other, other_end = connect()
    with noting_group_sockets():
        listener, client, _ = connect()
    shut_connections()
    assert client.recv(1) == b""
    other_end.sendall(b"x")
    assert other.recv(1) == b"x"
    with socket.create_connection(listener.getsockname()) as again:
        listener.accept()[0].close()
        assert again.recv(1) == b""
    shut_connections()  # twice is fine

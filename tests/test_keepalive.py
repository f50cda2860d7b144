"""Keepalive: connections to other addresses fail after the host timeout; those within a host are left alone."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Iterator

import pytest

from nbdist.keepalive import HOST_TIMEOUT_VARIABLE, host_timeout_s, keep_alive

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="all of 127.0.0.0/8 is this host on Linux only")


@contextlib.contextmanager
def connection(client: str, server: str) -> Iterator[socket.socket]:
    with (
        socket.create_server((server, 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=(client, 0)) as peer,
    ):
        yield peer


def user_timeout_ms(peer: socket.socket) -> int:
    return peer.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_both_sides_notice_within_the_timeout(monkeypatch):
    monkeypatch.setenv(HOST_TIMEOUT_VARIABLE, "7")
    with connection("127.0.0.1", "127.0.0.2") as peer:
        keep_alive(peer)
        assert user_timeout_ms(peer) == 7000
        assert peer.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        counts = [
            peer.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in ("TCP_KEEPIDLE", "TCP_KEEPCNT")
        ]
        assert counts == [1, 7]


def test_it_is_three_seconds_by_default(monkeypatch):
    monkeypatch.delenv(HOST_TIMEOUT_VARIABLE, raising=False)
    assert host_timeout_s() == 3.0


def test_connections_within_a_host_are_left_alone():
    with connection("127.0.0.1", "127.0.0.1") as peer:
        keep_alive(peer)
        assert user_timeout_ms(peer) == 0


def test_sockets_that_are_no_connections_are_left_alone():
    left, right = socket.socketpair()
    with left, right, socket.create_server(("127.0.0.1", 0)) as listener:
        keep_alive(left)
        keep_alive(listener)
        assert user_timeout_ms(listener) == 0

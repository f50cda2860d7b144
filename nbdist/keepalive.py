"""Keepalive of TCP connections: one whose other host has vanished without a word fails after the host timeout.

Standard library only: the store's server, a separate process, uses it too, and starts in milliseconds.
"""

from __future__ import annotations

import contextlib
import os
import socket

__all__ = ["HOST_TIMEOUT_S", "HOST_TIMEOUT_VARIABLE", "host_timeout_s", "keep_alive", "leads_elsewhere"]

HOST_TIMEOUT_VARIABLE = "NBDIST_HOST_TIMEOUT"
HOST_TIMEOUT_S = 3.0
"""By default: shorter than any pause that a user would wait out, longer than a wireless link's."""


def host_timeout_s() -> float:
    """After how many seconds without an answer a host counts as lost: ``$NBDIST_HOST_TIMEOUT``, by default 3."""
    return float(os.environ.get(HOST_TIMEOUT_VARIABLE) or HOST_TIMEOUT_S)


def leads_elsewhere(peer: socket.socket) -> bool:
    """Whether a socket is a TCP connection to another host."""
    if peer.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    try:
        return bool(peer.getpeername()[0] != peer.getsockname()[0])
    except OSError:  # it listens, or is closed already
        return False


def keep_alive(peer: socket.socket) -> None:
    """Let a connection to another host fail when that host has not answered for `host_timeout_s`. Local.

    Both settings are needed: keepalive covers a side that only waits, the user timeout one that has sent something.
    Connections within a host are left alone: a process that ends there always closes them.
    """
    if not leads_elsewhere(peer):
        return
    timeout_s = host_timeout_s()
    settings = (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPALIVE", 1),  # the same on macOS
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", max(1, round(timeout_s))),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", max(1, round(1000 * timeout_s))),
    )
    for level, name, value in settings:
        if (option := getattr(socket, name, None)) is not None:
            with contextlib.suppress(OSError):
                peer.setsockopt(level, option, value)

"""A host is told from others, and is called something."""

from __future__ import annotations

import socket

from nbdist.telemetry.host import host_id, host_name


def test_a_host_has_one_name(run_ranks):
    """Processes that can map each other's segments agree on it."""
    assert [host_id()] * 2 == run_ranks(2, name_host)


def name_host(_world):
    return host_id()


def test_a_name_can_be_given(monkeypatch):
    """Where it cannot be seen from inside."""
    monkeypatch.delenv("NBDIST_HOST", raising=False)
    assert socket.gethostname() == host_name()
    monkeypatch.setenv("NBDIST_HOST", "mine")
    assert ("mine", "mine") == (host_name(), host_id())

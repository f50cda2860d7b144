"""A host has an id of its own, and a name."""

from __future__ import annotations

import socket

from nbdist.telemetry.host import host_id, host_name


def test_a_host_has_one_name(run_ranks):
    """Processes that can map each other's segments have the same id."""
    assert [host_id()] * 2 == run_ranks(2, name_host)


def name_host(_world):
    return host_id()


def test_a_name_can_be_given(monkeypatch):
    """Where a process cannot detect the host."""
    monkeypatch.delenv("NBDIST_HOST", raising=False)
    assert socket.gethostname() == host_name()
    monkeypatch.setenv("NBDIST_HOST", "mine")
    assert ("mine", "mine") == (host_name(), host_id())

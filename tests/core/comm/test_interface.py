"""The interface of torch's backends is chosen anew for each world, and never instead of the user's own."""

from __future__ import annotations

import os
import sys

import pytest

from nbdist.core.comm import interface
from nbdist.core.comm.interface import address_towards, choose_interface, own_address
from nbdist.telemetry.host import INTERFACE_VARIABLE

GLOO, NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    for variable in (GLOO, NCCL, INTERFACE_VARIABLE):
        monkeypatch.setenv(variable, "")  # so that it is restored
        monkeypatch.delenv(variable)
    monkeypatch.setattr(interface, "_chosen", {})


def test_a_process_that_was_alone_on_its_host_finds_other_hosts_in_the_next_world(monkeypatch):
    monkeypatch.setenv(INTERFACE_VARIABLE, "eth7")
    choose_interface(one_host=True)
    assert (os.environ[GLOO], os.environ.get(NCCL)) == (LOOPBACK, None)
    choose_interface(one_host=False)
    assert (os.environ[GLOO], os.environ[NCCL]) == ("eth7", "eth7")
    choose_interface(one_host=True)
    assert (os.environ[GLOO], os.environ.get(NCCL)) == (LOOPBACK, None)


def test_without_one_torch_chooses_between_hosts():
    choose_interface(one_host=True)
    choose_interface(one_host=False)
    assert GLOO not in os.environ


def test_the_users_own_stays(monkeypatch):
    monkeypatch.setenv(GLOO, "ib0")
    for one_host in (True, False, True):
        choose_interface(one_host=one_host)
        assert os.environ[GLOO] == "ib0"


class Store:
    """A store at an address."""

    address = "127.0.0.5:4000", "secret"


def test_the_own_address_is_that_of_the_chosen_interface_or_the_one_towards_the_store(monkeypatch):
    """Of torchrun's store only ``$MASTER_ADDR`` is known; without anything it is loopback."""
    assert own_address(Store()).startswith("127.")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert own_address(object()) == "127.0.0.1"
    monkeypatch.delenv("MASTER_ADDR")
    assert own_address(object()) == address_towards("no.such.host.invalid") == "127.0.0.1"
    monkeypatch.setenv(INTERFACE_VARIABLE, LOOPBACK)
    assert own_address(Store()) == "127.0.0.1"

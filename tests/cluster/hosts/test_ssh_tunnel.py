"""Tunnels: which ports each ssh forwards; `tests/hosts/test_firewalls.py` trains through them."""

from __future__ import annotations

import re

import pytest

from nbdist.cluster.hosts.ssh import Ssh
from nbdist.cluster.hosts.ssh_tunnel import tunnelled
from nbdist.errors import PlanError

HOSTS = ["h1", "h2", "h3"]


def forwarded(command: list[str], option: str) -> set[int]:
    ends = [re.fullmatch(rf"{option}127\.0\.0\.1:(\d+):127\.0\.0\.1:\1", word) for word in command]
    return {int(found[1]) for found in ends if found}


def test_every_port_leads_to_its_own_host():
    """It is forwarded by the ssh of each other host, and from there by that of its own."""
    tunnels = tunnelled(Ssh(), HOSTS, range(20000, 20100))
    assert len({*tunnels.own}.union(*tunnels.each.values())) == 40 + 3 * 16
    for host in HOSTS:
        command, own = tunnels.agent_command(host), {*tunnels.each[host]}
        elsewhere = {*tunnels.own}.union(*(tunnels.each[other] for other in HOSTS if other != host))
        assert (elsewhere, own) == (forwarded(command, "-R"), forwarded(command, "-L"))
        assert f"NBDIST_PORTS={min(own)}-{max(own)} exec " in command[-1]


def test_the_same_hosts_get_the_same_ports_again():
    """So that agents which wait can be used by the next cluster."""
    assert tunnelled(Ssh(), HOSTS, range(0)) == tunnelled(Ssh(), HOSTS, range(0))


def test_too_few_ports():
    with pytest.raises(PlanError, match="60 ports are too few for tunnels to 3 hosts: give 88 or more"):
        tunnelled(Ssh(), HOSTS, range(20000, 20060))

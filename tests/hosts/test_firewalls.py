"""Hosts behind firewalls: which connections there are between them, with fixed ports and through ssh."""

from __future__ import annotations

import functools
import re
import subprocess
from pathlib import Path

import pytest
from gate import Gate
from shared_cluster import HUNG_S, until
from small_training import DATA, OPTIONS, bits, held, model

import nbdist
from nbdist.errors import ClusterError, PlanError
from nbdist.listening import PORTS_VARIABLE

OPTIONS = {**OPTIONS, "epochs": 2, "strategy": "dp=2,pp=2"}
HOSTS = {"local": 1, "h1": 1, "h2": 2}
pytestmark = pytest.mark.usefixtures("no_agents")  # which connect to other ports
PORTS = "10101-10160"


@pytest.fixture(autouse=True)
def _ports(monkeypatch):
    monkeypatch.setenv(PORTS_VARIABLE, "")


@pytest.fixture(scope="module")
def expected():
    """The bits of four ranks of one host."""
    with nbdist.Cluster(4, device="cpu", spares=0) as cluster:
        cluster.train(trained := model(), DATA, loss="mse", **OPTIONS)
    return bits(trained)


def ports_between_hosts(network) -> list[set[int]]:
    """Both ports of each connection between two hosts."""
    found = []
    for host in (None, "h1", "h2"):
        command = "ss -Htn state established"
        lines = network.run(host, command) if host else subprocess.check_output(command.split(), text=True)
        for line in lines.splitlines():
            (own, own_port), (other, port) = re.findall(r"([\d.]+):(\d+)", line)
            if own != other:
                found.append({int(own_port), int(port)})
    return found


@pytest.mark.parametrize(("options", "allowed"), [({"ports": PORTS}, range(10101, 10161)), ({"tunnel": True}, [22])])
def test_no_other_ports_and_the_same_bits(network, expected, shared, options, allowed):
    """Also where a host is lost."""
    gate = Gate(shared)
    with nbdist.Cluster(hosts=HOSTS, device="cpu", **options) as cluster:
        cluster.train(undisturbed := model(), DATA, loss="mse", **OPTIONS)
        assert bits(undisturbed) == expected
        run = cluster.train(trained := model(), DATA, loss=functools.partial(held, gate), background=True, **OPTIONS)
        until(lambda: all(gate.is_reached("forward", rank) for rank in (1, 3)))
        pairs = ports_between_hosts(network)
        assert pairs
        assert not [pair for pair in pairs if not pair & {22, *allowed}]
        network.crash("h2")
        gate.open("forward")
        run.wait(HUNG_S)
        assert bits(trained) == expected


def test_a_port_that_is_taken_on_the_other_host_is_named(network):
    """By the ssh that would forward it."""
    network.run("h1", "(nc -l 127.0.0.1 20007 || python3 -m http.server --bind 127.0.0.1 20007) > /dev/null 2>&1 &")
    until(lambda: "20007" in network.run("h1", "ss -Htln"))
    with pytest.raises(ClusterError, match=r"host h1 is lost: .*remote port forwarding failed for listen port 20007"):
        nbdist.Cluster(hosts={"h1": 1}, device="cpu", tunnel=True, ports="20000-20060").start()
    network.run("h1", "pkill -f 20007")


@pytest.fixture
def six(network):
    """h1 by a name that has an IPv6 address only."""
    hosts = Path("/etc/hosts")
    before = hosts.read_text()
    subprocess.run(["ip", "-6", "address", "add", "fd77::1/64", "dev", "eth0", "nodad"], check=True)
    network.run("h1", "ip -6 address add fd77::11/64 dev eth0 nodad")
    hosts.write_text(f"{before}fd77::11 six\n")
    yield "six"
    hosts.write_text(before)
    subprocess.run(["ip", "-6", "address", "delete", "fd77::1/64", "dev", "eth0"], check=True)
    network.run("h1", "ip -6 address delete fd77::11/64 dev eth0")


def test_a_host_with_an_ipv6_address_only_is_reached_through_a_tunnel(six, expected):
    """As the sentence says that comes without."""
    with pytest.raises(PlanError, match=r"host six has an IPv6 address only, .* with --tunnel"):
        nbdist.Cluster(hosts={six: 2})
    with nbdist.Cluster(hosts={"local": 2, six: 2}, device="cpu", tunnel=True) as cluster:
        cluster.train(trained := model(), DATA, loss="mse", **OPTIONS)
        assert bits(trained) == expected

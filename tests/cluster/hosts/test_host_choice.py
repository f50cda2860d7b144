"""The choice of hosts: what is not possible is one sentence, before anything is started."""

from __future__ import annotations

import shutil

import pytest

from nbdist import Cluster
from nbdist.cluster.hosts.host_choice import HostChoice, parse_hosts
from nbdist.errors import PlanError

needs_ssh = pytest.mark.skipif(shutil.which("ssh") is None, reason="ssh is not installed")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"hosts": {}}, "no host is named"),
        ({"hosts": {"-oProxyCommand=x": 1}}, "is no name of a host"),
        ({"hosts": {"h1 h2": 1}}, "is no name of a host"),
        ({"hosts": {"h1": 0}}, "0 engines on host h1 are not possible"),
        ({"hosts": {"h1": True}}, "True engines on host h1 are not possible"),
        ({"hosts": {"h1": 2}, "engines": 2}, "engines and hosts exclude each other"),
        ({"hosts": {"h1": 2}, "host_timeout": 0.5}, "a host timeout of 0.5 is not possible"),
        ({"hosts": {"h1": 2}, "ports": "x"}, "'x' is no range of ports: use FIRST-LAST"),
        ({"hosts": {"h1": 2}, "ports": "10101-10110"}, r"10 ports .10101-10110. are too few: give 40 or more"),
        ({"hosts": {"h1": 2}, "tunnel": True, "launcher": "mpi"}, "a tunnel is made by ssh: name the hosts with hosts"),
        ({"hosts": {"h1": 2}, "tunnel": True, "interface": "eth0"}, "interface 'eth0' is not used by a tunnel"),
        ({"engines": 1, "tunnel": True}, "tunnel is about other hosts: name them with hosts"),
        ({"hosts": {"h1": 2}, "tunel": True}, "unknown option 'tunel'. Did you mean 'tunnel'"),
        ({"engines": 1, "interface": "eth0"}, "interface is about other hosts: name them with hosts"),
        ({"launcher": "mpi", "launcher_args": "-v"}, "launcher_args and launcher are about other hosts"),
        ({"launcher": "slrm", "hosts": {"h1": 2}}, "unknown launcher 'slrm': use ssh, slurm, mpi. Did you mean .slurm"),
        ({"launcher": "slurm", "hosts": {"h1": 2}}, "Slurm chooses the hosts: say how many nodes"),
        ({"nodes": 2, "hosts": {"h1": 2}}, "nodes=2 is about a job of Slurm: give launcher='slurm' too"),
        ({"hosts": {"local": 4000}}, "4000 engines are more than this machine can run"),
    ],
)
def test_what_is_not_possible_is_one_sentence(options, sentence):
    with pytest.raises(PlanError, match=sentence):
        Cluster(**options)


@needs_ssh
def test_the_number_of_engines_is_known_as_far_as_it_is_given():
    choice = HostChoice(engines={"h1": 2, "local": 3, "h2": None})
    assert (choice.size, choice.others) == (5, ["h1", "h2"])
    assert Cluster(hosts={"127.0.0.1": 2, "local": 1}).hosts == {"127.0.0.1": 2, "local": 1}


@needs_ssh
def test_an_unknown_host_is_named_before_a_running_cluster_is_stopped():
    with pytest.raises(PlanError, match=r"the address of host no-such-host\.invalid is not known here"):
        Cluster(hosts={"no-such-host.invalid": 2})


def test_hosts_on_a_line():
    assert parse_hosts("h1:2, user@h2 ,local:1") == {"h1": 2, "user@h2": None, "local": 1}
    for text in ("h1:2,h1:3", "h1:two", "h1:"):
        with pytest.raises(PlanError, match="use each host once"):
            parse_hosts(text)


def test_what_a_running_cluster_is_kept_for():
    """The same hosts, reached in the same way, as far as the user says."""
    hosts = {"engines": {"h1": 1}}
    plain, tunnel, ports = (
        HostChoice(**hosts),
        HostChoice(**hosts, tunnel=True),
        HostChoice(**hosts, ports="10101-10150"),
    )
    assert plain.kept_by(tunnel)
    assert plain.kept_by(ports)
    assert not tunnel.kept_by(plain)
    assert not ports.kept_by(tunnel)
    assert not plain.kept_by(HostChoice(engines={"h1": 2}))
    assert not HostChoice(engines={}, connect="a").kept_by(HostChoice(engines={}, connect="b"))

"""Doctor: each of its lines, by breaking one thing at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import types

import pytest

from nbdist.cluster.hosts import doctor
from nbdist.cluster.hosts.doctor import examine_hosts
from nbdist.cluster.hosts.ssh import Ssh


def findings(*hosts, launcher=None, **options):
    """What is not as it should be: host, what was tried, and the result."""
    found = list(examine_hosts(launcher or Ssh(), hosts, **options))
    return {(one.host, one.tried): f"{one.kind}: {one.result}" for one in found if one.kind != "ok"}


def ssh(*arguments: str) -> Ssh:
    return Ssh(arguments=arguments)


@pytest.mark.usefixtures("no_agents")
def test_hosts_on_which_all_is_well(network):
    """Each thing that was tried has a line."""
    found = list(examine_hosts(Ssh(), ["h1", "h2"]))
    assert {one.kind for one in found} == {"ok"}
    each = ["address", "log in", "versions", "to this host", "clock", "shared folder"]
    assert [one.tried for one in found if one.host == "h1"] == [*each, "to h2"]
    assert "MB/s there" in str(found[-1])
    assert not any("python" in command for host in network.names for command in network.processes(host).values())


@pytest.mark.parametrize(
    ("launcher", "words"),
    [
        (ssh("-p", "2222"), "refused: start an ssh server there"),
        (ssh("-o", "IdentitiesOnly=yes", "-o", "IdentityFile=/dev/null"), r"Permission denied.*ssh-copy-id h1"),
        (ssh("-o", "UserKnownHostsFile=/dev/null"), "Host key verification failed: log in once by hand .ssh h1."),
        (Ssh(python="/nowhere/python"), "/nowhere/python: (not found|No such file).*: install Python there"),
        (Ssh(python=os.path.realpath(sys.executable)), "No module named 'nbdist'.*: install there what is here"),
    ],
    ids=["no server", "no key", "unknown key", "no Python", "no nbdist"],
)  # fmt: skip
def test_why_it_cannot_log_in(network, launcher, words):
    found = findings("h1", launcher=launcher)
    assert [*found] == [("h1", "log in")]
    assert re_found(words, found["h1", "log in"])


def re_found(words: str, text: str) -> bool:
    return text.startswith("FAILED") and re.search(words, text) is not None


def test_a_host_that_is_not_there(network):
    network.cut("h1")
    found = findings("h1", "h2", launcher=ssh("-o", "ConnectTimeout=1"))
    assert [*found] == [("h1", "log in")]
    assert re_found("timed out: is it on", found["h1", "log in"])


def test_a_name_that_is_not_known(network):
    found = findings("nowhere", "h2")
    assert [*found] == [("nowhere", "address")]
    assert re_found("the address of host nowhere is not known here", found["nowhere", "address"])


def test_another_version(network, monkeypatch):
    own = doctor.versions()
    monkeypatch.setattr(doctor, "versions", lambda: {**own, "torch": "1.0"})
    found = findings("h1")
    assert [*found] == [("h1", "versions")]
    words = f"torch {re.escape(own['torch'])} in .*, and here torch 1.0: install the same"
    assert re_found(words, found["h1", "versions"])


def test_an_interface_that_does_not_lead_there(network):
    found = findings("h1", interface="lo")
    assert [*found] == [("h1", "to this host")]
    assert re_found("refused: let the firewall of this host pass", found["h1", "to this host"])


def test_hosts_that_do_not_reach_each_other(network):
    """Only one way is closed, but a connection needs both."""
    network.run("h2", "ip route add blackhole 10.77.0.11/32")
    found = findings("h1", "h2")
    network.run("h2", "ip route delete blackhole 10.77.0.11/32")
    assert [*found] == [("h1", "to h2"), ("h2", "to h1")]
    assert re_found("timed out: let the firewall of h2 pass connections from h1", found["h1", "to h2"])


def test_a_slow_network(network):
    network.rate("h1", "60mbit")
    found = findings("h1")
    assert [*found] == [("h1", "to this host")]
    assert found["h1", "to this host"].startswith("note: ")
    assert "MB/s back, slow: prefer dp over these hosts" in found["h1", "to this host"]


def test_a_clock_that_differs(network, monkeypatch):
    late = types.SimpleNamespace(time=lambda: time.time() - 100, monotonic=time.monotonic)
    monkeypatch.setattr(doctor, "time", late)
    found = findings("h1")
    assert [*found] == [("h1", "clock")]
    assert found["h1", "clock"].startswith("note: +100.0 s: training does not depend on it")


def test_a_folder_that_is_not_shared(network, tmp_path):
    found = findings("h1", folder=str(tmp_path))
    assert [*found] == [("h1", "shared folder")]
    assert f"note: {tmp_path} is not the same there" in found["h1", "shared folder"]


def test_the_command_examines_and_trains(network):
    """Or ends with what has to be mended."""
    command = [sys.executable, "-m", "nbdist", "doctor", "--device", "cpu", "--hosts"]
    well = subprocess.run([*command, "h1:1,h2:1"], capture_output=True, text=True, check=False)
    assert well.returncode == 0, well.stderr
    assert well.stdout.endswith("all is well\n")
    ill = subprocess.run([*command, "h1:1,nowhere:1"], capture_output=True, text=True, check=False)
    assert ill.returncode == 1
    assert ill.stdout.endswith("1 of these must be mended before engines can run there\n")

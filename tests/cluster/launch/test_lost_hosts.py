"""A lost host is tried until it answers, and given up with its cluster."""

from __future__ import annotations

import shlex
import sys
import threading

import pytest
from shared_cluster import HUNG_S, until

from nbdist.cluster.hosts.agents import Agents
from nbdist.cluster.hosts.remote_host import RemoteHost
from nbdist.cluster.launch import lost_hosts
from nbdist.cluster.launch.lost_hosts import LostHosts
from nbdist.keepalive import HOST_TIMEOUT_VARIABLE

AGENT = f"exec {shlex.quote(sys.executable)} -c 'from nbdist.cluster.hosts.agent_server import main; main()'"


class Seeking:
    """Tries a host whose agent starts once a file is there; counts the tries."""

    def __init__(self, agents, folder):
        self.up, self.tried = folder / "up", []
        self.found: list[RemoteHost] = []
        self._agents = agents
        self.back = threading.Event()
        self.hosts = LostHosts(self.begin, self.note)

    def begin(self, name):
        if name == "silent":  # its agent starts, and never answers
            host = RemoteHost(name, self._agents.start(name, ["cat"]), self._agents)
            host.begin(0.01)
            self.tried.append(host)
            return host
        command = ["sh", "-c", f"test -e {shlex.quote(str(self.up))} || exit 1; {AGENT}"]
        host = RemoteHost(name, self._agents.start(name, command), self._agents)
        host.begin(HUNG_S)
        self.tried.append(host)
        return host

    def note(self, host):
        self.found.append(host)
        self.back.set()


@pytest.fixture
def seeking(monkeypatch, tmp_path):
    """Without waits."""
    monkeypatch.setenv(HOST_TIMEOUT_VARIABLE, str(HUNG_S))
    monkeypatch.setattr(lost_hosts, "_WAITS_S", (0.01,))
    monkeypatch.setattr(lost_hosts, "_LONGEST_WAIT_S", 0.01)
    agents = Agents("127.0.0.1")
    made = Seeking(agents, tmp_path)
    yield made
    made.hosts.close()
    for host in made.tried:
        host.end_agent()
    agents.close()


def test_it_is_tried_until_it_answers(seeking):
    """Once, however often it is asked for; and again when it is lost again."""
    for _ in range(2):
        seeking.hosts.seek("h1")
    until(lambda: 2 < len(seeking.tried))
    assert not seeking.found
    seeking.up.touch()
    assert seeking.back.wait(HUNG_S)
    (host,) = seeking.found
    assert ("h1", False) == (host.facts.name, host.lost)
    assert host is seeking.tried[-1]
    seeking.back.clear()
    seeking.hosts.seek("h1")
    assert seeking.back.wait(HUNG_S)


def test_a_host_that_does_not_answer_in_time_is_not_back(seeking):
    seeking.hosts.seek("silent")
    until(lambda: 2 < len(seeking.tried))
    assert not seeking.found


def test_it_is_given_up_with_its_cluster(seeking):
    """No thread, and no agent that nobody uses, is left."""
    seeking.hosts.seek("h1")
    until(lambda: seeking.tried)
    seeking.hosts.close()
    assert not [thread for thread in threading.enumerate() if "seeks" in thread.name]
    seeking.up.touch()
    seeking.hosts.seek("h2")
    assert {"h1"} == {host.name for host in seeking.tried}
    assert not seeking.found

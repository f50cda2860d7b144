"""The agents of a detached cluster: for one kernel after another, through the process that has their connections."""

from __future__ import annotations

import signal
import socket
import threading

import psutil
import pytest
from shared_cluster import HUNG_S, until
from test_agents import AGENT

from nbdist.cluster.hosts.agent_proxy import AgentProxy
from nbdist.cluster.hosts.host import HostLostError
from nbdist.cluster.hosts.proxied_agents import ProxiedAgents
from nbdist.cluster.hosts.remote_host import RemoteHost
from nbdist.errors import ClusterError
from nbdist.keepalive import HOST_TIMEOUT_VARIABLE


@pytest.fixture
def path(tmp_path, monkeypatch):
    """The socket of a proxy."""
    monkeypatch.setenv(HOST_TIMEOUT_VARIABLE, str(HUNG_S))
    path = str(tmp_path / "agents")
    proxy = AgentProxy("127.0.0.1", path)
    yield path
    proxy.close()


def children() -> list[psutil.Process]:
    return [process for process in psutil.Process().children() if "agent_server" in " ".join(process.cmdline())]


def test_one_kernel_after_another_reaches_the_same_agent(path):
    """What the first one made is there for the second; errors are the agent's own."""
    first = ProxiedAgents(path)
    host = RemoteHost("h1", first.start("h1", AGENT), first)
    assert "h1" == host.facts.name
    (held,) = host.hold(1)
    host.write_memory(held, 0, b"kept")
    with pytest.raises(ClusterError, match=r"host h1: AttributeError: .*_do_nothing"):
        first.request(host.identity, "nothing").result(HUNG_S)
    first.close()
    second = ProxiedAgents(path)
    again = RemoteHost("h1", host.identity, second)
    assert host.facts == again.facts
    again.adopt()
    assert [b"kept"] == again.read_memory([(held, 0, 4)])
    again.end_agent()
    assert again.lost
    assert not children()
    second.close()


def test_a_lost_agent_is_reported_to_each_kernel(path):
    """What waits for it fails."""
    first, lost = ProxiedAgents(path), threading.Event()
    host = RemoteHost("h1", first.start("h1", AGENT), first)
    host.begin(HUNG_S, lambda host: lost.set())
    assert host.facts
    (agent,) = children()
    agent.send_signal(signal.SIGSTOP)
    waiting = first.request(host.identity, "log_tail")
    agent.send_signal(signal.SIGKILL)
    with pytest.raises(HostLostError, match="host h1 is lost"):
        waiting.result(HUNG_S)
    assert lost.wait(HUNG_S)
    second = ProxiedAgents(path)
    again = RemoteHost("h1", host.identity, second)
    until(lambda: again.lost)
    for agents in (first, second):
        agents.close()


def test_without_the_proxy_all_hosts_are_lost(tmp_path):
    """Its process was killed, and the agents end by themselves."""
    path, lost = str(tmp_path / "agents"), threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        agents = ProxiedAgents(path)
        agents.follow("1", lambda event: None, lost.set)
        waiting = agents.hello("1")
        listener.accept()[0].close()
    assert lost.wait(HUNG_S)
    with pytest.raises(HostLostError, match="the anchor of this cluster has ended"):
        waiting.result(HUNG_S)
    with pytest.raises(HostLostError, match="the anchor of this cluster has ended"):
        agents.request("1", "hold", 1).result(HUNG_S)
    assert agents.lost("1")
    agents.close()

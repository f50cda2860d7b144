"""An agent, here a process of this host: what it does for the kernel, whom it serves, and when it ends.

What it is for, on other hosts: tests/hosts.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil
import pytest
import zmq
from shared_cluster import HUNG_S, until

from nbdist.cluster.hosts.agents import Agents
from nbdist.cluster.hosts.host import HostLostError
from nbdist.cluster.hosts.local_host import versions
from nbdist.cluster.hosts.remote_host import RemoteHost
from nbdist.errors import ClusterError
from nbdist.keepalive import HOST_TIMEOUT_VARIABLE
from nbdist.telemetry.host import host_id

AGENT = [sys.executable, "-c", "from nbdist.cluster.hosts.agent_server import main; main()"]
MIB = 2**20


@pytest.fixture
def agents(monkeypatch):
    """Those of a kernel, which have as long as they need: no test is about lateness."""
    monkeypatch.setenv(HOST_TIMEOUT_VARIABLE, str(HUNG_S))
    made = Agents("127.0.0.1")
    yield made
    made.close()


@pytest.fixture
def start(agents):
    """``start(name, command)``: a host with its agent."""
    with contextlib.ExitStack() as started:

        def started_host(name="h1", command=AGENT):
            host = RemoteHost(name, agents.start(name, command), agents)
            host.begin(HUNG_S)
            started.callback(host.end_agent)
            return host

        yield started_host


def processes_of(host) -> list[psutil.Process]:
    parent = psutil.Process(host._agents._agents[host.identity].program.pid)
    return [parent, *parent.children(recursive=True)]


def all_ended(processes) -> bool:
    return not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes)


def test_it_tells_what_its_host_is(start):
    facts = start().facts
    assert (facts.name, facts.host_id, facts.address) == ("h1", host_id(), "127.0.0.1")
    assert (facts.python, facts.versions) == (sys.executable, versions())
    assert facts.cores >= 1


def test_memory_of_any_size_is_written_and_read(start):
    host = start()
    assert host.facts
    path, small = host.hold(2)
    content = bytes(range(256)) * (9 * MIB // 256) + b"end"
    host.write_memory(path, 7, memoryview(content))
    host.write_memory(small, 0, b"small")
    found = host.read_memory([(path, 7, len(content)), (small, 0, 3), (small, 1, 100)])
    assert found == [content, b"sma", b"mall"]
    host.empty([path])
    assert host.read_memory([(path, 0, 10)]) == [b""]
    host.release([path, small])


def test_what_it_cannot_do_is_an_error_that_names_the_host(start, agents):
    host = start()
    assert host.facts
    with pytest.raises(ClusterError, match=r"host h1: AttributeError: .*_do_nothing"):
        agents.request(host.identity, "nothing").result(HUNG_S)


def test_it_ends_with_its_input_and_all_that_it_started(start):
    host = start()
    assert host.facts
    processes = processes_of(host)
    host.end_agent()
    until(lambda: all_ended(processes))
    assert host.lost


def test_it_waits_for_the_next_cluster(start):
    """What it has started has ended, and memory that it holds is gone; its folder is another one."""
    host = start()
    assert host.facts
    (path,) = host.hold(1)
    (agent, *rest) = processes_of(host)
    host.end()
    assert host.waits
    host.begin(HUNG_S)
    assert not host.waits
    with pytest.raises(ClusterError):
        host.read_memory([(path, 0, 1)])
    assert [agent, *rest] == processes_of(host)
    assert host.hold(1)


def test_it_ends_with_the_kernels_connection_although_its_input_stays(start, agents):
    host = start()
    assert host.facts
    processes = processes_of(host)
    agents.close()
    until(lambda: all_ended(processes))


def test_a_killed_agent_is_a_lost_host(start, agents, monkeypatch, tmp_path):
    """What waits for it fails, who asks is told, and nothing that it started, or its folder, lives on."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    host, lost = start(), threading.Event()
    host.on_lost = lambda host: lost.set()
    assert host.facts
    processes = processes_of(host)
    processes[0].send_signal(signal.SIGSTOP)
    waiting = agents.request(host.identity, "log_tail")
    processes[0].send_signal(signal.SIGKILL)
    with pytest.raises(HostLostError, match=r"host h1 is lost: its (agent|connection) has ended"):
        waiting.result(HUNG_S)
    assert lost.wait(HUNG_S)
    assert host.lost
    assert (host.processes(), host.runs("1:1"), host.log_tail()) == (set(), False, "host h1 is lost.")
    with pytest.raises(HostLostError):
        host.hold(1)
    until(lambda: all_ended(processes))
    until(lambda: [] == list(Path(tempfile.gettempdir()).glob("nbdist-*")))


def test_a_program_that_fails_is_named_by_its_last_line(start):
    host = start(command=["sh", "-c", "printf 'one\\nPermission denied, please try again\\n' >&2; exit 1"])
    with pytest.raises(HostLostError, match=r"host h1 is lost: its agent has ended \(Permission denied, please"):
        _ = host.facts


@contextlib.contextmanager
def connected(invitation, identity):
    """A socket with the keys of an invitation, under an identity."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as peer:
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.IDENTITY, identity.encode())
        peer.curve_serverkey = invitation["server_key"].encode()
        peer.curve_publickey, peer.curve_secretkey = (invitation[f"{k}_key"].encode() for k in ("public", "secret"))
        peer.connect(invitation["controller"])
        yield peer


def test_one_agent_may_not_speak_for_another(agents, monkeypatch):
    """With its own keys and the other's name it is not believed."""
    other = agents.invite("h1")["identity"]
    invitation, seen, receive = agents.invite("h2"), threading.Event(), agents._receive
    monkeypatch.setattr(agents, "_receive", lambda frames: (receive(frames), seen.set()))
    with connected(invitation, other) as forger:
        forger.send_multipart([b"", json.dumps(["hello", {}]).encode()])
        assert seen.wait(HUNG_S)
    assert not agents.hello(other).done()
    assert not agents.hello(invitation["identity"]).done()


def test_an_agent_that_counts_as_lost_says_nothing_more(start, agents, monkeypatch):
    """As where its ssh has ended before it had begun; the others are."""
    invitations, invite, seen, receive = [], agents.invite, threading.Event(), agents._receive
    monkeypatch.setattr(agents, "invite", lambda name: invitations.append(invite(name)) or invitations[-1])
    lost = start(command=["false"])
    with pytest.raises(HostLostError):
        _ = lost.facts
    monkeypatch.setattr(agents, "_receive", lambda frames: (receive(frames), seen.set()))
    with connected(invitations[0], lost.identity) as late:
        late.send_multipart([b"", json.dumps(["hello", {}]).encode()])
        assert seen.wait(HUNG_S)
    assert start("h2").facts.host_id == host_id()


def test_a_terminated_agent_ends_once_it_may(start):
    """At once where nobody uses its host; else when the kernel says so, or when it gets SIGTERM again."""
    idle, used, again = hosts = [start(name) for name in ("idle", "used", "again")]
    terminated = {host: threading.Event() for host in (used, again)}
    used.on_terminated = again.on_terminated = lambda host: terminated[host].set()
    assert all(host.facts for host in hosts)
    processes = {host: processes_of(host) for host in hosts}
    for host in hosts:
        processes[host][0].terminate()
    until(lambda: all_ended(processes[idle]))
    assert all(event.wait(HUNG_S) for event in terminated.values())
    assert used.hold(1)  # it still answers
    used.hang_up()
    processes[again][0].terminate()
    until(lambda: all_ended(processes[used] + processes[again]))


def test_an_agent_without_a_line_of_input_ends():
    ended = subprocess.run(AGENT, input=b"", capture_output=True, timeout=HUNG_S, check=False)
    assert ended.returncode == 1
    assert b"the kernel has ended before this agent has begun" in ended.stderr

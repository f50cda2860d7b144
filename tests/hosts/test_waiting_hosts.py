"""Between two clusters the agents of hosts wait: nothing else does, and nothing at all once they are told, or lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch
from shared_cluster import until

import nbdist
from nbdist.cluster.hosts.waiting_hosts import end_hosts, waiting_hosts

pytestmark = pytest.mark.usefixtures("no_agents")
HOSTS = {"h1": 1, "h2": 1}
KERNEL = """
import nbdist, sys
with nbdist.Cluster(hosts={"h1": 1, "h2": 1}, device="cpu"):
    pass
print("stopped", flush=True)
sys.stdin.read()
"""


def train_once() -> list[float]:
    """Losses on new engines of two hosts."""
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    with nbdist.Cluster(hosts=HOSTS, device="cpu") as cluster:
        return cluster.train(torch.nn.Linear(3, 1), (x, x.sum(1, keepdim=True)), loss="mse").history


def waiting(network) -> dict[str, dict[int, str]]:
    """What is left on each host."""
    return {host: network.processes(host) for host in HOSTS}


def folders(network) -> str:
    return "".join(network.run(host, "ls -d /tmp/nbdist-*/* 2>/dev/null") for host in HOSTS)


def test_the_next_cluster_uses_the_same_agents(network):
    """Agent and fork server stay, and no engine; both clusters give the same losses."""
    first = train_once()
    assert ["h1", "h2"] == sorted(waiting_hosts())
    left = waiting(network)
    assert {2} == {len(processes) for processes in left.values()}
    assert not [line for line in folders(network).split() if not line.endswith("agent.log")]
    second = train_once()
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    assert left == waiting(network)
    end_hosts()
    assert not any(waiting(network).values())
    assert "" == folders(network)
    assert not waiting_hosts()
    train_once()


def test_a_host_that_is_lost_while_it_waits_is_started_again(network):
    """It may have been down; the other one is used as it is."""
    train_once()
    before = waiting(network)
    network.crash("h2")
    network.mend()
    until(lambda: ["h1"] == waiting_hosts())
    until(lambda: 1 == len([child for child in psutil.Process().children() if child.name() == "ssh"]))
    train_once()
    after = waiting(network)
    assert before["h1"] == after["h1"]
    assert 2 == len(after["h2"])


def test_what_waits_ends_with_the_kernel(network):
    """However that ends."""
    kernel = subprocess.Popen([sys.executable, "-c", KERNEL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert kernel.stdout.readline() == "stopped\n"
        assert all(waiting(network).values())
        os.kill(kernel.pid, signal.SIGKILL)
        until(lambda: not any(waiting(network).values()))
    finally:
        kernel.kill()
        kernel.communicate()

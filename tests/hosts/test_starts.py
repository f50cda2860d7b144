"""A start on hosts that cannot be used is one sentence, and no kernel leaves anything on them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from shared_cluster import HUNG_S, until

import nbdist
from nbdist.cluster.hosts.waiting_hosts import end_hosts
from nbdist.errors import ClusterError, PlanError

KERNEL = """
import nbdist, sys
nbdist.Cluster(hosts={"h1": 2, "h2": 2}, device="cpu").start()
print("ready", flush=True)
sys.stdin.read()
"""
OTHER_TORCH = """
import importlib.metadata, socket
if socket.gethostname() == "h2":
    version = importlib.metadata.version
    importlib.metadata.version = lambda name: "1.0" if name == "torch" else version(name)
"""


@pytest.fixture
def settings(shared, monkeypatch):
    """``settings(statement)``: of ipyparallel's `SSHEngineLauncher`."""
    folder = shared / "profile_default"
    folder.mkdir()
    monkeypatch.setenv("IPYTHONDIR", str(shared))
    return lambda statement: (folder / "ipcluster_config.py").write_text(
        f"get_config().SSHEngineLauncher.{statement}\n"
    )


@pytest.mark.usefixtures("no_agents")
def test_a_killed_kernel_leaves_nothing_on_any_host(network):
    kernel = subprocess.Popen([sys.executable, "-c", KERNEL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert kernel.stdout.readline() == "ready\n"
        assert all(network.processes(host) for host in ("h1", "h2"))
        os.kill(kernel.pid, signal.SIGKILL)
        until(lambda: not any(network.processes(host) for host in ("h1", "h2")))
        assert "" == "".join(network.run(host, "ls -d /tmp/nbdist-* 2>/dev/null") for host in ("h1", "h2"))
    finally:
        kernel.kill()
        kernel.communicate()


@pytest.mark.usefixtures("no_agents")
def test_another_environment_is_named_before_an_engine_starts(network, shared, settings):
    (shared / "sitecustomize.py").write_text(OTHER_TORCH)
    python = shared / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={shared} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    settings(f"remote_python = {str(python)!r}")
    with pytest.raises(ClusterError, match=rf"host h2 has another environment: torch 1.0 in .*, and here torch {2}"):
        nbdist.Cluster(hosts={"h1": 1, "h2": 1}, device="cpu").start()
    end_hosts()
    until(lambda: not any(network.processes(host) for host in ("h1", "h2")))


def test_a_host_that_ssh_does_not_reach_is_named(network, settings):
    """The user's own arguments for ssh count before nbdist's, which would wait ten seconds."""
    settings("ssh_args = ['-o', 'ConnectTimeout=1']")
    network.crash("h2")
    with pytest.raises(ClusterError, match=r"host h2 is lost: its agent has ended \(ssh: connect to host h2"):
        nbdist.Cluster(hosts={"h1": 1, "h2": 1}, device="cpu", timeout_s=HUNG_S).start()


@pytest.mark.usefixtures("no_agents")
def test_one_host_by_two_names_is_refused(network):
    """Its engines would be counted, and signalled, as those of either."""
    with pytest.raises(PlanError, match=r"h1 and 10\.77\.0\.11 are the same host: name it once"):
        nbdist.Cluster(hosts={"h1": 1, "10.77.0.11": 1}, device="cpu").start()
    end_hosts()
    until(lambda: not network.processes("h1"))


def test_a_host_that_nobody_knows_is_named_before_anything_starts():
    with pytest.raises(PlanError, match="the address of host h77 is not known here"):
        nbdist.Cluster(hosts={"h77": 1}, device="cpu").start()

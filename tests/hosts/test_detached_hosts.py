"""A cluster over several hosts outlives its kernel: its run goes on, and another kernel takes all of it over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch
from gate import Gate
from shared_cluster import HUNG_S, until
from small_training import DATA, bits, model

import nbdist
from nbdist.cluster import detached_clusters

PATIENCE_S = 600.0
KERNEL = """
import sys
sys.path[:0] = ["tests", "tests/hosts"]
import nbdist
from gate import Gate
from small_training import DATA, model
from test_engines import OPTIONS

cluster = nbdist.Cluster(hosts={"h1": 2, "h2": 2}, device="cpu", detach=float(sys.argv[2])).start()
cluster.push(value=3)
net = model()
gate = Gate(sys.argv[1], 6)
cluster.train(net, DATA, names=("net", "DATA"), strategy="dp=2,pp=2", lr_scheduler=gate, background=True, **OPTIONS)
print("training", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def folder(shared):
    """Where the gate is: all hosts see it."""
    return shared


def abandoned(folder, patience_s=PATIENCE_S) -> Gate:
    """Train over two hosts in a kernel, kill it in the middle of the run, which is held at the gate."""
    gate = Gate(folder, 6)
    command = [sys.executable, "-c", KERNEL, str(folder), str(patience_s)]
    kernel = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert kernel.stdout.readline() == "training\n"
        gate.wait(6, ranks=4)
        os.kill(kernel.pid, signal.SIGKILL)
    finally:
        kernel.kill()
        kernel.communicate()
    return gate


@pytest.fixture(scope="module")
def expected():
    """The bits of four ranks on one host."""
    from test_engines import OPTIONS

    with nbdist.Cluster(4, device="cpu") as cluster:
        cluster.train(trained := model(), DATA, strategy="dp=2,pp=2", **OPTIONS)
    return bits(trained)


@pytest.mark.usefixtures("no_agents")
@pytest.mark.parametrize("fault", [None, "crash"])
def test_another_kernel_takes_over_run_and_hosts(network, folder, expected, fault):
    """With the weights of an undisturbed run, also where a host was lost while there was no kernel."""
    gate = abandoned(folder)
    if fault is not None:
        getattr(network, fault)("h2")
    names: dict[str, torch.nn.Module] = {}
    cluster = nbdist.Cluster.attach(namespace=names)
    try:
        assert 4 == cluster.size
        gate.open(6)
        run = nbdist.last_run()
        run.wait(HUNG_S)
        assert expected == bits(names["net"])
        assert [3] * 4 == [cluster.pull("value", rank) for rank in range(4)]
        if fault is None:
            assert ["h1", "h1", "h2", "h2"] == [engine.host for engine in cluster.engines]
        else:
            network.mend()
            until(lambda: ["h1", "h1", "h2", "h2"] == [engine.host for engine in cluster.start().engines])
    finally:
        cluster.stop()
    until(lambda: not any(network.processes(host) for host in network.names))
    assert not detached_clusters()


def test_a_run_ends_without_a_kernel(network, folder, expected):
    """Its weights come with the next one."""
    gate = abandoned(folder)
    gate.open(6)
    names: dict[str, torch.nn.Module] = {}
    until(lambda: '"finished"' in network.run("h1", "cat /tmp/nbdist-*/*/runs/*/rank0.jsonl 2>/dev/null"))
    cluster = nbdist.Cluster.attach(namespace=names)
    try:
        nbdist.last_run().wait(HUNG_S)
        assert expected == bits(names["net"])
    finally:
        cluster.stop()


@pytest.mark.usefixtures("no_agents")
def test_without_another_kernel_nothing_is_left(network, folder):
    """After its patience."""
    abandoned(folder, patience_s=1.0)
    until(lambda: not any(network.processes(host) for host in network.names))
    until(lambda: not detached_clusters())

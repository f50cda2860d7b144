"""Engines on several hosts: the bits of one host, and of an undisturbed run, whatever happens to a host."""

from __future__ import annotations

import functools
import re

import pytest
import torch
from gate import Gate
from shared_cluster import HUNG_S, until
from small_training import DATA, OPTIONS, bits, hosts_of, model
from torch.nn import functional as F

import nbdist

OPTIONS = {**OPTIONS, "loss": "mse", "epochs": 4}


def newest_step(run: nbdist.Run) -> int:
    """Of the newest snapshot that the notebook's host has."""
    return found[0] if (found := run.control.snapshot_store.newest) else -1


def resumed_from(run: nbdist.Run) -> int:
    """From which step the run went on after its loss."""
    (step,) = re.findall(r"all continue from step (\d+)", str(run.progress.notes))
    return int(step)


@pytest.fixture(scope="module")
def expected():
    """The bits that four ranks of one host give, by their mesh."""
    found = {}
    with nbdist.Cluster(4, device="cpu") as cluster:
        for mesh in ("dp=4", "dp=2,pp=2", "shard=4"):
            cluster.train(trained := model(), DATA, strategy=mesh, **OPTIONS)
            found[mesh] = bits(trained)
    return found


@pytest.fixture(scope="module")
def _cluster(expected):
    """Two engines on each of two hosts."""
    with nbdist.Cluster(hosts={"h1": 2, "h2": 2}, device="cpu") as started:
        yield started


def test_two_hosts_give_the_bits_of_one(cluster, expected):
    for mesh, one_host in expected.items():
        cluster.train(trained := model(), DATA, strategy=mesh, **OPTIONS)
        assert bits(trained) == one_host


@pytest.fixture
def gate(shared):
    """Holds a run after its 6th step."""
    return Gate(shared, 6)


def held(gate: Gate, y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The loss of `OPTIONS`; after the 6th step it waits, where an interrupt leaves that step complete."""
    if torch.is_grad_enabled() and nbdist.current_step() == 6:
        gate.hold("forward")
    return F.mse_loss(y, target)


@pytest.mark.parametrize("host", ["h1", "h2"])
@pytest.mark.parametrize("fault", ["cut", "unplug", "crash"])
def test_a_lost_host_costs_no_bit_and_no_step(cluster, network, expected, gate, fault, host):
    """The run is held while the host vanishes; the hosts that are left go on, and take its ranks."""
    options = {**OPTIONS, "loss": functools.partial(held, gate)}
    run = cluster.train(trained := model(), DATA, background=True, **options)
    gate.wait("forward", ranks=4, run=run)
    getattr(network, fault)(host)
    gate.open("forward")
    run.wait(HUNG_S)
    assert bits(trained) == expected["dp=4"]
    assert set(hosts_of(cluster)) == {"h1", "h2"} - {host}
    assert resumed_from(run) == 6
    assert f"lost (host {host} lost), replaced" in str(run.progress.notes)
    if fault != "crash":
        until(lambda: not network.processes(host))  # nobody can tell it to end them


@pytest.mark.parametrize("host", ["h1", "h2"])
def test_a_lost_host_costs_no_bit_where_a_replica_spans_hosts(cluster, network, expected, gate, host):
    """Each host has parts that the other has not: what it wrote is here."""
    options = {"lr_scheduler": gate, "background": True, "strategy": "shard=4"}
    run = cluster.train(trained := model(), DATA, **options, **OPTIONS)
    gate.wait(6, run=run)
    until(lambda: newest_step(run) > 0)
    network.cut(host)
    gate.open(6)
    run.wait(HUNG_S)
    assert bits(trained) == expected["shard=4"]
    assert resumed_from(run) > 0


def test_a_host_that_comes_back_gets_its_ranks_again(cluster, network, expected, gate):
    """At the next start, with their cells and values, although it has the same name and id; it may be lost again."""
    cluster.push(value=3)
    options = {"strategy": "dp=2,pp=2", **OPTIONS}
    run = cluster.train(trained := model(), DATA, lr_scheduler=gate, background=True, **options)
    gate.wait(6, run=run)
    network.cut("h2")
    gate.open(6)
    run.wait(HUNG_S)
    assert ["h1"] * 4 == hosts_of(cluster)
    network.mend()
    until(lambda: ["h1", "h1", "h2", "h2"] == hosts_of(cluster.start()))
    assert [3] * 4 == [cluster.pull("value", rank) for rank in range(4)]
    cluster.train(again := model(), DATA, **options)
    assert bits(trained) == bits(again) == expected["dp=2,pp=2"]
    network.cut("h2")
    until(lambda: ["lost", "lost"] == [engine.state for engine in cluster.engines[2:]])
    assert ["h1"] * 4 == hosts_of(cluster.start())


def test_a_killed_engine_is_replaced_on_its_host(cluster, network, expected, gate):
    run = cluster.train(trained := model(), DATA, lr_scheduler=gate, background=True, **OPTIONS)
    gate.wait(6, run=run)
    network.run("h2", f"kill -9 {cluster.engines[3].pid}")
    gate.open(6)
    run.wait(HUNG_S)
    assert bits(trained) == expected["dp=4"]
    assert resumed_from(run) > 0
    assert hosts_of(cluster) == ["h1", "h1", "h2", "h2"]


def test_engines_are_added_and_removed_on_hosts(cluster, expected):
    cluster.scale(6)
    assert sorted(hosts_of(cluster)) == ["h1"] * 3 + ["h2"] * 3
    cluster.scale(4)
    cluster.train(trained := model(), DATA, strategy="dp=4", **OPTIONS)
    assert bits(trained) == expected["dp=4"]


def test_an_agent_that_does_not_answer_in_time_ends(cluster, network):
    """It lives, and counts itself as connected; another one takes its place."""
    (agent,) = [pid for pid, command in network.processes("h2").items() if "agent_server" in command]
    network.run("h2", f"kill -STOP {agent}")
    until(lambda: ["lost", "lost"] == [engine.state for engine in cluster.engines[2:]])
    network.run("h2", f"kill -CONT {agent}")
    until(lambda: agent not in network.processes("h2"))
    until(lambda: hosts_of(cluster.start()) == ["h1", "h1", "h2", "h2"])

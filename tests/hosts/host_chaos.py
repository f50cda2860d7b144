"""Chaos over hosts: whatever happens to a host, at any moment, a run ends with the bits of an undisturbed one.

    python tests/hosts/host_network.py --hosts 2 python tests/hosts/host_chaos.py [--seed N] [--trials N]

Each trial starts two engines on each of two hosts, trains on a mesh, and lets something happen to a host at a random
step. Afterwards nothing may be left on any host. ``make chaos`` runs it.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from host_network import CONTROL_VARIABLE, HostNetwork
from torch import nn

import nbdist
from nbdist.cluster.hosts.fork_client import end_server, require_server
from nbdist.cluster.hosts.waiting_hosts import end_hosts

STEPS = 800
MESHES = ("dp=4", "dp=2,pp=2", "shard=4", "tp=2,dp=2")
WITHIN_S, LEFT_WITHIN_S = 120.0, 15.0
X = torch.randn(1024, 6, generator=torch.Generator().manual_seed(1))
DATA = X, X.sum(1, keepdim=True).sin()

Fault = Callable[[HostNetwork, nbdist.Cluster, str], Any]


def kill_engines(network: HostNetwork, cluster: nbdist.Cluster, host: str) -> None:
    """Kill all engines of a host."""
    network.run(host, f"kill -9 {' '.join(str(each.pid) for each in cluster.engines if each.host == host)}")


def kill_agent(network: HostNetwork, cluster: nbdist.Cluster, host: str) -> None:
    """Kill the agent alone: what it has started ends with it."""
    agents = [pid for pid, command in network.processes(host).items() if "agent_server" in command]
    network.run(host, f"kill -9 {' '.join(map(str, agents))}")


def two_at_once(network: HostNetwork, cluster: nbdist.Cluster, host: str) -> None:
    """A host is cut off while an engine of the other one is killed."""
    (other,) = {each.host for each in cluster.engines} - {host}
    network.cut(host)
    network.run(other, f"kill -9 {next(each.pid for each in cluster.engines if each.host == other)}")


FAULTS: dict[str, Fault] = {
    "a host is cut off": lambda network, cluster, host: network.cut(host),
    "a host is unplugged": lambda network, cluster, host: network.unplug(host),
    "a host crashes": lambda network, cluster, host: network.crash(host),
    "all engines of a host are killed": kill_engines,
    "the agent of a host is killed": kill_agent,
    "a host is cut off, and an engine of the other killed": two_at_once,
}


def model() -> nn.Module:
    """The same weights each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def train(cluster: nbdist.Cluster, mesh: str, background: bool) -> tuple[nn.Module, nbdist.Run]:
    """Start a run of `STEPS` steps."""
    trained = model()
    run = cluster.train(
        trained, DATA, loss="mse", optimizer="adamw", lr=0.01, batch_size=64, steps=STEPS, strategy=mesh,
        background=background,
    )  # fmt: skip
    return trained, run


def bits(trained: nn.Module) -> bytes:
    """All weights."""
    return b"".join(parameter.detach().numpy().tobytes() for parameter in trained.parameters())


def trial(network: HostNetwork, fault: Fault, mesh: str, draw: random.Random, expected: bytes) -> str:
    """Returns what is wrong; empty if nothing is."""
    problem = ""
    with nbdist.Cluster(hosts={"h1": 2, "h2": 2}, device="cpu") as cluster:
        trained, run = train(cluster, mesh, background=True)
        at, host = draw.randrange(1, STEPS * 3 // 4), draw.choice(("h1", "h2"))
        deadline = time.monotonic() + WITHIN_S
        while run.progress.step < at and time.monotonic() < deadline:
            time.sleep(0.002)
        fault(network, cluster, host)
        try:
            run.wait(WITHIN_S)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if not problem and run.state != "finished":
            problem = f"the run is {run.state}"
        if not problem and bits(trained) != expected:
            problem = "other bits"
    network.mend()
    return problem or left_behind(network, ("agent_server", "fork_server"))


def left_behind(network: HostNetwork, but: tuple[str, ...] = ()) -> str:
    """Which processes stay on the hosts; empty if none does.

    Args:
        network: The hosts.
        but: Programs that may: those that wait for the next cluster.
    """
    deadline = time.monotonic() + LEFT_WITHIN_S
    while True:
        found = [f"{name}: {command}" for name in network.names for command in network.processes(name).values()]
        left = [each for each in found if not any(program in each for program in but)]
        if not left or time.monotonic() > deadline:
            return f"left behind: {left}" if left else ""
        time.sleep(0.1)


def main() -> int:
    """Run all faults on all meshes; returns 1 if one trial failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="Faults with these words in them.")
    parser.add_argument("--trials", type=int, default=4, help="Of each fault: one a mesh. Default: 4.")
    options = parser.parse_args()
    network, draw = HostNetwork(os.environ[CONTROL_VARIABLE]), random.Random(options.seed)
    require_server()
    expected = {}
    with nbdist.Cluster(4, device="cpu", spares=0) as cluster:
        for mesh in MESHES:
            trained, _ = train(cluster, mesh, background=False)
            expected[mesh] = bits(trained)
    failed, print_row = 0, "| {} | {} of {} | {:.1f} s |".format
    for name, fault in ((name, fault) for name, fault in FAULTS.items() if options.only in name):
        good, took = 0, []
        for number in range(options.trials):
            mesh, began_s = MESHES[number % len(MESHES)], time.monotonic()
            problem = trial(network, fault, mesh, draw, expected[mesh])
            took.append(time.monotonic() - began_s)
            good += not problem
            if problem:
                print(f"FAILED: {name}, {mesh}, seed {options.seed}: {problem}", flush=True)
        failed += options.trials - good
        print(print_row(name, good, options.trials, statistics.median(took)), flush=True)
    end_hosts()
    end_server()
    if left := left_behind(network):
        print(f"FAILED: {left}", flush=True)
    return int(failed > 0 or bool(left))


if __name__ == "__main__":
    sys.exit(main())

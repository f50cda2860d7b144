"""What a choice of hosts names: the launcher of their agents, or what allocates the hosts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.cluster.hosts.allocation import Allocation
from nbdist.cluster.hosts.host_choice import CONTROLLER_PORTS, HostChoice
from nbdist.cluster.hosts.mpi import Mpi
from nbdist.cluster.hosts.running_cluster import RunningCluster
from nbdist.cluster.hosts.slurm import SlurmJob
from nbdist.cluster.hosts.ssh import Ssh
from nbdist.cluster.hosts.ssh_tunnel import tunnelled
from nbdist.listening import parse_ports

__all__ = ["allocation_of", "launcher_of", "way_to_hosts"]


def allocation_of(choice: HostChoice, report: Callable[[str], None]) -> Allocation | None:
    """What the hosts are of, once it has begun; None where they are named.

    Args:
        choice: See `HostChoice`.
        report: Progress callback: is told while that is waited for.

    Raises:
        PlanError: It cannot give what is chosen.
        ClusterError: It gives nothing.
    """
    if choice.by_slurm:
        return SlurmJob.begin(choice.nodes, choice.total, choice.launcher_args, report)
    return RunningCluster.connect(choice.connect, choice.engines, report) if choice.connect else None


def way_to_hosts(choice: HostChoice, allocation: Allocation | None) -> tuple[AgentLauncher, range]:
    """How agents are started on the other hosts, and the ports of this one; any if there are none.

    Raises:
        PlanError: The launcher is not installed here, or ports are too few.
    """
    launcher = launcher_of(choice) if allocation is None else allocation.launcher
    ports = parse_ports(choice.ports)
    if choice.tunnel:
        tunnels = tunnelled(launcher, choice.others, ports)
        return tunnels, tunnels.own
    return replace(launcher, ports=ports[CONTROLLER_PORTS:]), ports


def launcher_of(choice: HostChoice) -> AgentLauncher:
    """How agents are started on hosts that are named.

    Raises:
        PlanError: It is not installed here.
    """
    return (Ssh if choice.launcher == "ssh" else Mpi).of_user(*choice.launcher_args)

"""The launcher that a choice of hosts names."""

from __future__ import annotations

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.cluster.hosts.host_choice import HostChoice
from nbdist.cluster.hosts.mpi import Mpi
from nbdist.cluster.hosts.slurm import Slurm
from nbdist.cluster.hosts.ssh import Ssh

__all__ = ["launcher_of"]


def launcher_of(choice: HostChoice, job: str = "") -> AgentLauncher:
    """How agents are started.

    Args:
        choice: Names the launcher, and says what it gets.
        job: The id of the job of Slurm.

    Raises:
        PlanError: It is not installed here.
    """
    if choice.by_slurm:
        return Slurm(job=job)
    return (Ssh if choice.launcher == "ssh" else Mpi).of_user(*choice.launcher_args)

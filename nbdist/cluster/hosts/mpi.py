"""MPI: starts agents with ``mpirun`` of Open MPI or of MPICH and its kind, one process a host."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.errors import PlanError

__all__ = ["Mpi"]


@dataclass(frozen=True, kw_only=True)
class Mpi(AgentLauncher):
    """See `AgentLauncher`. Each agent is a job of its own, so that a lost host ends no other.

    Args:
        command: ``mpirun``, or what this site has in its place.
        arguments: For it.
    """

    command: tuple[str, ...] = ("mpiexec",)
    arguments: tuple[str, ...] = ()

    @classmethod
    def of_user(cls, *arguments: str) -> Mpi:
        """Ipyparallel's settings: those of ``MPILauncher`` in the user's ``ipcluster_config.py``.

        Args:
            *arguments: For ``mpirun``, beside those of the settings.

        Raises:
            PlanError: It is not installed here.
        """
        import ipyparallel
        from ipyparallel.cluster.launcher import MPILauncher

        launcher = MPILauncher(config=ipyparallel.Cluster(cluster_file="", shutdown_atexit=False, log_level=40).config)
        command = tuple(launcher.mpi_cmd)
        if shutil.which(command[0]) is None:
            raise PlanError(f"{command[0]!r} is not installed here: load this site's MPI module, or use ssh.")
        return cls(command=command, arguments=(*launcher.mpi_args, *arguments))

    def command_on(self, host: str, line: str) -> list[str]:
        """See `AgentLauncher`. Both kinds of MPI know these options, and pass their input to the process."""
        return [*self.command, *self.arguments, "-n", "1", "-host", host, "sh", "-c", line]

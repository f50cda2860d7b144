"""ssh: starts agents on hosts that are named as ssh knows them."""

from __future__ import annotations

import contextlib
import subprocess
from dataclasses import dataclass

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.errors import PlanError

__all__ = ["Ssh"]

_SETTINGS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=1", "ServerAliveCountMax=3")
_OPTIONS = ("-T", *(part for setting in _SETTINGS for part in ("-o", setting)))
"""No terminal and no questions; a host that does not answer ends ssh. ssh takes the first of two: the user's own."""
_ASKED_WITHIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Ssh(AgentLauncher):
    """See `AgentLauncher`.

    Args:
        command: ssh's own.
        arguments: For it.
    """

    command: tuple[str, ...] = ("ssh",)
    arguments: tuple[str, ...] = ()

    @classmethod
    def of_user(cls, *arguments: str) -> Ssh:
        """Ipyparallel's settings for it: those of ``SSHEngineLauncher`` in the user's ``ipcluster_config.py``.

        Args:
            *arguments: For ssh, before those of the settings.
        """
        import ipyparallel
        from ipyparallel.cluster.launcher import SSHEngineLauncher

        config = ipyparallel.Cluster(cluster_file="", shutdown_atexit=False, log_level=40).config
        launcher = SSHEngineLauncher(config=config)
        stated = any("remote_python" in config.get(kind.__name__, {}) for kind in SSHEngineLauncher.__mro__)
        python = str(launcher.remote_python) if stated else ""
        return cls(command=tuple(launcher.ssh_cmd), arguments=(*arguments, *launcher.ssh_args), python=python)

    def command_on(self, host: str, line: str) -> list[str]:
        """See `AgentLauncher`."""
        return [*self.command, *self.arguments, *_OPTIONS, host, line]

    def real_name(self, host: str) -> str:
        """What ssh's settings say for the name of a host."""
        asked = ""
        with contextlib.suppress(subprocess.TimeoutExpired):
            try:
                asked = subprocess.run(
                    [*self.command, *self.arguments, "-G", host], capture_output=True, text=True, check=False,
                    timeout=_ASKED_WITHIN_S, stdin=subprocess.DEVNULL,
                ).stdout  # fmt: skip
            except FileNotFoundError:
                raise PlanError(
                    f"{self.command[0]!r} is not installed here: engines on other hosts are started through it."
                ) from None
        settings = dict(line.split(" ", 1) for line in asked.splitlines() if " " in line)
        return settings.get("hostname", host)

"""ssh: how an agent is started on another host, and at which of this host's addresses that one reaches it."""

from __future__ import annotations

import contextlib
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from nbdist.errors import PlanError
from nbdist.telemetry.host import own_address_to

__all__ = ["Ssh"]

_SETTINGS = ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=1", "ServerAliveCountMax=3")
_OPTIONS = ("-T", *(part for setting in _SETTINGS for part in ("-o", setting)))
"""No terminal and no questions; a host that does not answer ends ssh. ssh takes the first of two: the user's own."""
_PROGRAM = "from nbdist.cluster.hosts.agent_server import main; main()"
_ASKED_WITHIN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class Ssh:
    """How ssh is called. Hosts are named as ssh knows them.

    Args:
        command: ssh's own.
        arguments: For it.
        python: Python on the other hosts; by default the path of this one, if it exists there, else ``python3``.
    """

    command: tuple[str, ...] = ("ssh",)
    arguments: tuple[str, ...] = ()
    python: str = ""

    @classmethod
    def of_user(cls) -> Ssh:
        """Ipyparallel's settings for it: those of ``SSHEngineLauncher`` in the user's ``ipcluster_config.py``."""
        import ipyparallel
        from ipyparallel.cluster.launcher import SSHEngineLauncher

        config = ipyparallel.Cluster(cluster_file="", shutdown_atexit=False, log_level=40).config
        launcher = SSHEngineLauncher(config=config)
        stated = any("remote_python" in config.get(kind.__name__, {}) for kind in SSHEngineLauncher.__mro__)
        python = str(launcher.remote_python) if stated else ""
        return cls(command=tuple(launcher.ssh_cmd), arguments=tuple(launcher.ssh_args), python=python)

    def agent_command(self, host: str) -> list[str]:
        """The command that runs an agent on a host."""
        chosen = shlex.quote(self.python or sys.executable)
        found = chosen if self.python else f'"$(command -v {chosen} || command -v python3 || printf %s {chosen})"'
        return [*self.command, *self.arguments, *_OPTIONS, host, f"exec {found} -c {shlex.quote(_PROGRAM)}"]

    def address_towards(self, hosts: Iterable[str], interface: str | None = None) -> str:
        """The address of this host at which other hosts reach it. Nothing is sent to them.

        Args:
            hosts: The other hosts.
            interface: The network interface to use, or an address of this host; by default the one towards them.

        Raises:
            PlanError: There is no such interface; or hosts cannot be found, or are reached over different interfaces.
        """
        if interface:
            return _address_of(interface)
        found = {host: self._address_to(host) for host in hosts}
        if len(set(found.values())) > 1:
            listed = ", ".join(f"{host} from {address}" for host, address in found.items())
            raise PlanError(f"the hosts are reached over different interfaces ({listed}): choose one with --interface.")
        return next(iter(found.values()))

    def _address_to(self, host: str) -> str:
        name = self._real_name(host)
        try:
            return own_address_to(name)
        except OSError as error:
            raise PlanError(
                f"the address of host {host} is not known here ({error.strerror or error}): use a name of "
                "~/.ssh/config or of the network; behind a jump host, choose this host's interface with --interface."
            ) from None

    def _real_name(self, host: str) -> str:
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


def _address_of(interface: str) -> str:
    by_name = psutil.net_if_addrs()
    for name, addresses in by_name.items():
        for each in addresses:
            if each.family == socket.AF_INET and interface in (name, each.address):
                return each.address
    raise PlanError(f"this host has no interface {interface!r} with an IPv4 address: it has {', '.join(by_name)}.")

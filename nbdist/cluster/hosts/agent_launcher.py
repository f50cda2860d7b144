"""How agents are started on other hosts: a command for each host, and the address at which that one reaches this."""

from __future__ import annotations

import contextlib
import shlex
import socket
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import psutil

from nbdist.errors import PlanError
from nbdist.listening import PORTS_VARIABLE
from nbdist.telemetry.host import own_address_to

__all__ = ["AgentLauncher"]

_PROGRAM = "from nbdist.cluster.hosts.agent_server import main; main()"


@dataclass(frozen=True, kw_only=True)
class AgentLauncher(ABC):
    """Starts agents; can be pickled, for another kernel.

    Args:
        python: Python on the other hosts; by default the path of this one, if it exists there, else ``python3``.
        ports: Those that are listened on there; any if there are none.
    """

    python: str = ""
    ports: range = range(0)

    @abstractmethod
    def command_on(self, host: str, line: str) -> list[str]:
        """The command that runs a shell's line on a host, and passes its own standard input to it."""

    def agent_command(self, host: str) -> list[str]:
        """The command that runs an agent on a host; it gets its invitation on its standard input."""
        return self.program_command(host, _PROGRAM)

    def program_command(self, host: str, program: str) -> list[str]:
        """The command that runs a program in Python on a host."""
        ports, python = self.ports_on(host), self.python_on(host)
        variable = f"{PORTS_VARIABLE}={ports[0]}-{ports[-1]} " if ports else ""
        chosen = shlex.quote(python or sys.executable)
        found = chosen if python else f'"$(command -v {chosen} || command -v python3 || printf %s {chosen})"'
        return self.command_on(host, f"{variable}exec {found} -c {shlex.quote(program)}")

    def python_on(self, host: str) -> str:
        """See `python`."""
        return self.python

    def ports_on(self, host: str) -> range:
        """Those that are listened on at a host."""
        return self.ports

    @property
    def tunnels(self) -> bool:
        """Whether it carries all connections between hosts."""
        return False

    def real_name(self, host: str) -> str:
        """The name of a host on the network."""
        return host

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
        name = self.real_name(host)
        try:
            return own_address_to(name)
        except OSError as error:
            with contextlib.suppress(OSError):
                socket.getaddrinfo(name, None, socket.AF_INET6)
                raise PlanError(
                    f"host {host} has an IPv6 address only, which ipyparallel's controller does not use: give its "
                    "IPv4 address a name, or let ssh carry all connections with --tunnel."
                ) from None
            raise PlanError(
                f"the address of host {host} is not known here ({error.strerror or error}): use a name of "
                "~/.ssh/config or of the network; behind a jump host, choose this host's interface with --interface."
            ) from None


def _address_of(interface: str) -> str:
    by_name = psutil.net_if_addrs()
    for name, addresses in by_name.items():
        for each in addresses:
            if each.family == socket.AF_INET and interface in (name, each.address):
                return each.address
    raise PlanError(f"this host has no interface {interface!r} with an IPv4 address: it has {', '.join(by_name)}.")

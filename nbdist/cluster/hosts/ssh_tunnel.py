"""Tunnel: all connections between hosts go through their ssh, so that a firewall has to let through no other port.

Every process listens on loopback. A port number is used on one host only, and stands for it on all others: there ssh
listens, and forwards to the notebook's host, from which the other host's ssh forwards again.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.cluster.hosts.host_choice import FEWEST_PORTS
from nbdist.cluster.hosts.ssh import Ssh
from nbdist.errors import PlanError

__all__ = ["TunnelledSsh", "tunnelled"]

_LOOPBACK = "127.0.0.1"
_PORTS_EACH = 16
"""Of every other host: those on which its ranks wait for others, for a moment each."""
_FREE = range(20000, 32768)
"""Among which ports are chosen: not ephemeral ones, which a connection may have got."""
_SETTINGS = ("-o", "ExitOnForwardFailure=yes", "-o", "ControlPath=none")
_chosen: dict[tuple[str, ...], range] = {}
"""For each choice of hosts, so that agents which wait can be used again."""


@dataclass(frozen=True, kw_only=True)
class TunnelledSsh(Ssh):
    """See `AgentLauncher`.

    Args:
        own: The ports of the notebook's host.
        each: The ports of every other one.
    """

    own: range
    each: Mapping[str, range] = field(default_factory=dict)

    def agent_command(self, host: str) -> list[str]:
        """See `AgentLauncher`; this ssh forwards too."""
        others = [port for name, ports in self.each.items() if name != host for port in ports]
        forwards = [f"-R{_forward(port)}" for port in (*self.own, *others)]
        forwards += [f"-L{_forward(port)}" for port in self.each[host]]
        with_forwards = replace(self, arguments=(*self.arguments, *_SETTINGS, *forwards))
        return super(TunnelledSsh, with_forwards).agent_command(host)

    @property
    def tunnels(self) -> bool:
        """See `AgentLauncher`."""
        return True

    def address_towards(self, hosts: Iterable[str], interface: str | None = None) -> str:
        """See `AgentLauncher`: every end of a tunnel is on loopback."""
        return _LOOPBACK

    def ports_on(self, host: str) -> range:
        """See `AgentLauncher`."""
        return self.each[host]


def tunnelled(launcher: AgentLauncher, hosts: Sequence[str], ports: range) -> TunnelledSsh:
    """A launcher whose ssh makes the tunnels.

    Args:
        launcher: The one without.
        hosts: The other hosts.
        ports: Those to use; by default any that are free here, probably.

    Raises:
        PlanError: They are too few.
    """
    assert isinstance(launcher, Ssh)
    needed = FEWEST_PORTS + _PORTS_EACH * len(hosts)
    if not ports:
        first = random.SystemRandom().choice(_FREE[: -needed + 1])
        ports = _chosen.setdefault(tuple(hosts), range(first, first + needed))
    if len(ports) < needed:
        raise PlanError(f"{len(ports)} ports are too few for tunnels to {len(hosts)} hosts: give {needed} or more.")
    each = {name: ports[needed - _PORTS_EACH * (number + 1) :][:_PORTS_EACH] for number, name in enumerate(hosts)}
    return TunnelledSsh(
        command=launcher.command, arguments=launcher.arguments, python=launcher.python, own=ports[:FEWEST_PORTS],
        each=each,
    )  # fmt: skip


def _forward(port: int) -> str:
    return f"{_LOOPBACK}:{port}:{_LOOPBACK}:{port}"

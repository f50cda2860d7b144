"""The choice of hosts: how many engines on each, and how they are reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nbdist.errors import PlanError, suggest
from nbdist.listening import parse_ports
from nbdist.plan.option_values import whole_number

__all__ = ["CONTROLLER_PORTS", "FEWEST_PORTS", "LAUNCHERS", "LOCAL", "HostChoice", "parse_hosts"]

LAUNCHERS = ("ssh", "slurm", "mpi")
"""Through what agents are started on other hosts."""

CONTROLLER_PORTS = 24
"""At least as many as ipyparallel's controller binds: else it takes others."""

FEWEST_PORTS = CONTROLLER_PORTS + 16
"""Of a range: the controller's, and those that processes of this host listen on."""

LOCAL = "local"
"""The notebook's own host, among names of hosts."""


@dataclass(frozen=True, kw_only=True)
class HostChoice:
    """On which hosts engines are started.

    Args:
        engines: How many on each host, by its name for the launcher or as `LOCAL`; None for the default there. Empty as
            long as hosts are not known, see `allocated`.
        launcher: Through what agents are started on other hosts, one of `LAUNCHERS`.
        launcher_args: For that.
        nodes: With Slurm, on how many of them; None for all of the present job, or one of a new one.
        total: Where hosts are `allocated`, how many engines in all; None for the default on each.
        connect: The connection file of a running cluster of ipyparallel, whose hosts they are; empty without one.
        interface: This host's network interface towards the others, or its address there; by default the one to them.
        ports: The range of ports that is listened on, such as 10101-10160; empty to leave it as it is.
        tunnel: Whether ssh carries all connections between hosts.
        timeout_s: After how many seconds without a word a host counts as lost; None leaves it as it is.
        device: What ranks compute on: with "cpu" a host's GPUs do not count.

    Raises:
        PlanError: Something of it is not possible.
    """

    engines: Mapping[str, int | None]
    launcher: str = "ssh"
    launcher_args: tuple[str, ...] = ()
    nodes: int | None = None
    total: int | None = None
    connect: str = ""
    interface: str | None = None
    ports: str = ""
    tunnel: bool = False
    timeout_s: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            listed = ", ".join(LAUNCHERS)
            raise PlanError(f"unknown launcher {self.launcher!r}: use {listed}.{suggest(self.launcher, LAUNCHERS)}")
        if self.nodes is not None:
            whole_number("nodes", self.nodes, 1)
        if not (self.engines or self.allocated):
            raise PlanError("no host is named: use names as ssh knows them, such as h1:2,h2:2.")
        for name, count in self.engines.items():
            if not isinstance(name, str) or not name or name.startswith("-") or set(name) & set(", \t\n"):
                raise PlanError(f"{name!r} is no name of a host: use one that ssh knows.")
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise PlanError(f"{count!r} engines on host {name} are not possible: use a whole number, 1 or more.")
        number = isinstance(self.timeout_s, (int, float)) and not isinstance(self.timeout_s, bool)
        if self.timeout_s is not None and not (number and 1 <= self.timeout_s < math.inf):
            raise PlanError(f"a host timeout of {self.timeout_s!r} is not possible: use seconds, 1 or more.")
        given = {
            "interface": self.interface, "ports": self.ports or None, "tunnel": self.tunnel or None,
            "host_timeout": self.timeout_s, "launcher_args": self.launcher_args or None,
            "launcher": None if self.launcher == "ssh" else self.launcher,
        }  # fmt: skip
        about = [name for name, value in given.items() if value is not None]
        if not self.elsewhere and about:
            verb = "are" if len(about) > 1 else "is"
            raise PlanError(f"{' and '.join(about)} {verb} about other hosts: name them with hosts.")
        self._check_ports()
        if self.connect and self.launcher != "ssh":
            raise PlanError(
                f"launcher={self.launcher!r} is not for a cluster that runs: its engines start what is needed."
            )
        if self.nodes is not None and not self.by_slurm:
            raise PlanError(f"nodes={self.nodes} is about a job of Slurm: give launcher='slurm' too.")

    def _check_ports(self) -> None:
        try:
            ports = parse_ports(self.ports)
        except ValueError as error:
            raise PlanError(f"{error}.") from None
        if ports and len(ports) < FEWEST_PORTS:
            raise PlanError(f"{len(ports)} ports ({self.ports}) are too few: give {FEWEST_PORTS} or more.")
        if self.tunnel and (self.launcher != "ssh" or self.allocated):
            raise PlanError("a tunnel is made by ssh: name the hosts with hosts, and no other launcher.")
        if self.tunnel and self.interface is not None:
            raise PlanError(f"interface {self.interface!r} is not used by a tunnel, which ends on loopback: omit it.")

    @property
    def by_slurm(self) -> bool:
        """Whether the hosts are the nodes of a job of Slurm."""
        return self.launcher == "slurm"

    @property
    def allocated(self) -> bool:
        """Whether the hosts are known only once the engines start: an `Allocation` says which they are."""
        return self.by_slurm or bool(self.connect)

    @property
    def elsewhere(self) -> bool:
        """Whether engines are, or may be, on other hosts."""
        return bool(self.others) or self.allocated

    @property
    def others(self) -> list[str]:
        """The names of the hosts but this one."""
        return [name for name in self.engines if name != LOCAL]

    @property
    def named(self) -> dict[str, int | None]:
        """How many engines on each host; where those are `allocated`, also how many nodes, and engines in all."""
        return {**self.engines, **({"nodes": self.nodes, "engines": self.total} if self.allocated else {})}

    def kept_by(self, other: HostChoice) -> bool:
        """Whether a cluster of another choice is what this one asks for: hosts, engines, and how they are reached."""
        same = (self.named, self.launcher, self.connect) == (other.named, other.launcher, other.connect)
        return same and self.ports in ("", other.ports) and (other.tunnel or not self.tunnel)

    @property
    def size(self) -> int:
        """How many engines, as far as numbers are given."""
        return sum(count or 0 for count in self.engines.values()) or self.total or 0


def parse_hosts(text: str) -> dict[str, int | None]:
    """``h1:2,h2`` as the number of engines on each host; None where none is given.

    Raises:
        PlanError: It has another form.
    """
    hosts: dict[str, int | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, colon, count = part.partition(":")
        if name in hosts or (colon and not count.isdigit()):
            raise PlanError(f"--hosts {text!r} is not possible: use each host once, such as h1:2,h2:2.")
        hosts[name] = int(count) if colon else None
    return hosts

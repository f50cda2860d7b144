"""The choice of hosts: how many engines on each, and how they are reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nbdist.errors import PlanError, suggest
from nbdist.plan.option_values import whole_number

__all__ = ["LAUNCHERS", "LOCAL", "HostChoice"]

LAUNCHERS = ("ssh", "slurm", "mpi")
"""Through what agents are started on other hosts."""

LOCAL = "local"
"""The notebook's own host, among names of hosts."""


@dataclass(frozen=True, kw_only=True)
class HostChoice:
    """On which hosts engines are started.

    Args:
        engines: How many on each host, by its name for the launcher or as `LOCAL`; None for the default there. Empty as
            long as a job of Slurm has not begun, whose nodes the hosts are.
        launcher: Through what agents are started on other hosts, one of `LAUNCHERS`.
        launcher_args: For that.
        nodes: With Slurm, on how many of them; None for all of the present job, or one of a new one.
        total: With Slurm, how many engines in all; None for the default on each node.
        interface: This host's network interface towards the others, or its address there; by default the one to them.
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
    interface: str | None = None
    timeout_s: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.launcher not in LAUNCHERS:
            listed = ", ".join(LAUNCHERS)
            raise PlanError(f"unknown launcher {self.launcher!r}: use {listed}.{suggest(self.launcher, LAUNCHERS)}")
        if self.nodes is not None:
            whole_number("nodes", self.nodes, 1)
        if not (self.engines or self.by_slurm):
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
            "interface": self.interface, "host_timeout": self.timeout_s, "launcher_args": self.launcher_args or None,
            "launcher": None if self.launcher == "ssh" else self.launcher,
        }  # fmt: skip
        about = [name for name, value in given.items() if value is not None]
        if not self.elsewhere and about:
            verb = "are" if len(about) > 1 else "is"
            raise PlanError(f"{' and '.join(about)} {verb} about other hosts: name them with hosts.")
        if self.nodes is not None and not self.by_slurm:
            raise PlanError(f"nodes={self.nodes} is about a job of Slurm: give launcher='slurm' too.")

    @property
    def by_slurm(self) -> bool:
        """Whether the hosts are the nodes of a job of Slurm."""
        return self.launcher == "slurm"

    @property
    def elsewhere(self) -> bool:
        """Whether engines are, or may be, on other hosts."""
        return bool(self.others) or self.by_slurm

    @property
    def others(self) -> list[str]:
        """The names of the hosts but this one."""
        return [name for name in self.engines if name != LOCAL]

    @property
    def named(self) -> dict[str, int | None]:
        """How many engines on each host; of a job of Slurm, how many nodes, and engines in all."""
        return {"nodes": self.nodes, "engines": self.total} if self.by_slurm else dict(self.engines)

    @property
    def size(self) -> int:
        """How many engines, as far as numbers are given."""
        return sum(count or 0 for count in self.engines.values()) or self.total or 0

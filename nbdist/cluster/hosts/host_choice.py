"""The choice of hosts: how many engines on each, and how they are reached."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from nbdist.errors import PlanError

__all__ = ["LOCAL", "HostChoice"]

LOCAL = "local"
"""The notebook's own host, among names of hosts."""


@dataclass(frozen=True, kw_only=True)
class HostChoice:
    """On which hosts engines are started.

    Args:
        engines: How many on each host, by its name for ssh or as `LOCAL`; None for the default there.
        interface: This host's network interface towards the others, or its address there; by default the one to them.
        timeout_s: After how many seconds without a word a host counts as lost; None leaves it as it is.
        device: What ranks compute on: with "cpu" a host's GPUs do not count.

    Raises:
        PlanError: Something of it is not possible.
    """

    engines: Mapping[str, int | None]
    interface: str | None = None
    timeout_s: float | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.engines:
            raise PlanError("no host is named: use names as ssh knows them, such as h1:2,h2:2.")
        for name, count in self.engines.items():
            if not isinstance(name, str) or not name or name.startswith("-") or set(name) & set(", \t\n"):
                raise PlanError(f"{name!r} is no name of a host: use one that ssh knows.")
            if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
                raise PlanError(f"{count!r} engines on host {name} are not possible: use a whole number, 1 or more.")
        number = isinstance(self.timeout_s, (int, float)) and not isinstance(self.timeout_s, bool)
        if self.timeout_s is not None and not (number and 1 <= self.timeout_s < math.inf):
            raise PlanError(f"a host timeout of {self.timeout_s!r} is not possible: use seconds, 1 or more.")
        if not self.others and (self.interface is not None or self.timeout_s is not None):
            raise PlanError("interface and host_timeout are about other hosts: name them with hosts.")

    @property
    def others(self) -> list[str]:
        """The names of the hosts but this one."""
        return [name for name in self.engines if name != LOCAL]

    @property
    def size(self) -> int:
        """How many engines, as far as numbers are given."""
        return sum(count or 0 for count in self.engines.values())

"""Allocation: hosts that are known only once they have been asked for, and how agents are started on them."""

from __future__ import annotations

import abc
from collections.abc import Mapping

from nbdist.cluster.hosts.agent_launcher import AgentLauncher
from nbdist.errors import PlanError

__all__ = ["Allocation"]


class Allocation(abc.ABC):
    """Local to the kernel.

    Args:
        hosts: Their names, `LOCAL` for this one, with the number of engines where none is asked for; None for the
            default there.
        launcher: Starts agents on them.

    Attributes:
        launcher: See Args.
        ending: That it ends soon, and why, as a clause; empty before.
        held: Whether a run is trained, which has to save before this process ends too.
    """

    def __init__(self, hosts: Mapping[str, int | None], launcher: AgentLauncher) -> None:
        self._hosts, self.launcher = dict(hosts), launcher
        self.ending, self.held = "", False

    def engines(self, total: int | None) -> dict[str, int | None]:
        """How many engines on each host.

        Args:
            total: In all, as evenly as possible.

        Raises:
            PlanError: There are fewer engines than hosts.
        """
        if total is None:
            return dict(self._hosts)
        if total < len(self._hosts):
            raise PlanError(f"{total} engines are fewer than the {len(self._hosts)} hosts: use fewer hosts.")
        each, more = divmod(total, len(self._hosts))
        return {name: each + (number < more) for number, name in enumerate(self._hosts)}

    @abc.abstractmethod
    def end(self) -> None:
        """Give back what was asked for here. Twice is fine."""

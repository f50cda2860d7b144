"""What is known of a cluster at any time, without asking an engine."""

from __future__ import annotations

import os

from nbdist.cluster.engines import Engine, Engines
from nbdist.cluster.run import Run
from nbdist.cluster.trainings import Trainings
from nbdist.errors import ClusterError

__all__ = ["Facts"]


class Facts:
    """What is known of a cluster, whether it runs or not. Safe to ask while another thread stops it.

    Args:
        size: How many engines there are to be.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._up: Engines | None = None
        self._trainings: Trainings | None = None

    @property
    def size(self) -> int:
        """How many ranks there are, or are to be."""
        return self._size if (up := self._up) is None else up.size

    def __repr__(self) -> str:
        if self._up is None:
            return f"Cluster(engines={self.size}), not running"
        return f"Cluster(engines={self.size}), running on {', '.join(engine.device for engine in self.engines)}"

    @property
    def engines(self) -> list[Engine]:
        """One record an engine, in rank order; empty when the cluster does not run."""
        busy = (trainings := self._trainings) is not None and trainings.computing
        return [] if (up := self._up) is None else up.records(busy)

    @property
    def current_run(self) -> Run | None:
        """The run that the engines work on at the moment."""
        return None if (trainings := self._trainings) is None else trainings.current

    @property
    def queued(self) -> list[Run]:
        """The runs that wait for those before them to end."""
        return [] if (trainings := self._trainings) is None else trainings.queued

    @property
    def reachable(self) -> bool:
        """Whether the controller lives, through which everything goes; not so where the cluster does not run."""
        return (up := self._up) is not None and up.reachable

    @property
    def spare_engines(self) -> list[Engine]:
        """One record a spare, as far as they are ready; their rank is -1."""
        return [] if (up := self._up) is None else up.spares()

    @property
    def threads(self) -> int:
        """CPU threads of a rank by default: its host's cores over the ranks there."""
        return self._running().threads

    @property
    def transport(self) -> str:
        """What the gradients travel over: "shared memory", "gloo", "nccl", or "shared memory and gloo"."""
        return self._running().transport

    @property
    def start_seconds(self) -> float:
        """How long the start took."""
        return self._running().start_seconds

    @property
    def name(self) -> str:
        """By which another kernel can `attach` to it; empty where it ends with this one."""
        return "" if (up := self._up) is None or (anchor := up.anchor) is None else anchor.name

    def _running(self) -> Engines:
        if (up := self._up) is None:
            raise ClusterError("the cluster is not running: start it first.")
        if up.owner != os.getpid():
            raise ClusterError(f"the engines belong to process {up.owner}, and this is a fork of it: use them there.")
        return up

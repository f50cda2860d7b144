"""A dry run of a split model: one rank computes alone, with real shapes and meaningless values, to trace or time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from nbdist.core.comm import Channel, Pending
from nbdist.core.comm.channel import Done
from nbdist.core.strategies.tensor.apply import Parallelized

__all__ = ["dry_run"]


class NullChannel(Channel):
    """A channel without communication: gathers return this rank's tensor for every rank, reductions do nothing."""

    def start_all_reduce_(self, tensor: torch.Tensor) -> Pending:
        return Done()

    def start_broadcast_(self, tensor: torch.Tensor, source: int = 0) -> Pending:
        return Done()

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor.clone() for _ in range(self.size)]


@contextlib.contextmanager
def dry_run(parallelized: Parallelized | None) -> Iterator[None]:
    """Context in which one rank runs its part of a split model alone, to trace or time it. Local."""
    if parallelized is None:
        yield
        return
    axis = parallelized.axis
    real = axis.channel
    axis.use(NullChannel(real.rank, real.size, real.device))
    try:
        yield
    finally:
        axis.use(real)

"""Runs of a user's sampler or batch sampler, on rank 0: the keys of each global batch of each epoch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch

from nbdist.core.data.one_process import AsOneProcess
from nbdist.core.data.sources import Source
from nbdist.core.process import rng

__all__ = ["SamplerRuns", "set_epoch"]

_BLOCK = 64
"""Batches that are drawn and sent at a time; a sampler may have no end."""


class SamplerRuns:
    """Runs the sampler of a source once an epoch, under random numbers of its own.

    Args:
        source: Its `sampler` or `batch_sampler` is run.
        batch_size: Global batch size, of a `sampler`.
        seed: The plan's.
    """

    def __init__(self, source: Source, batch_size: int, seed: int) -> None:
        self._source, self._batch_size, self._seed = source, batch_size, seed
        self._run = 0  # epochs for which it has run

    def blocks(self, epoch: int) -> Iterator[list[list[Any]]]:
        """The keys of an epoch's batches, some batches at a time. Local.

        Earlier epochs run too, after a resume: the sampler may have its own generator, which must advance.
        """
        for passed in range(self._run + 1, epoch):
            for _ in self._blocks(passed):
                pass
        self._run = max(self._run, epoch)
        yield from self._blocks(epoch)

    def _blocks(self, epoch: int) -> Iterator[list[list[Any]]]:
        batches: Iterator[list[Any]] | None = None
        for block in itertools.count():
            with rng.fork_rng(torch.device("cpu")), AsOneProcess():
                # So that the keys are the same after a resume, and whatever the steps draw meanwhile.
                rng.seed_all(rng.derive(self._seed, "sampler", epoch, *([block] if block else [])))
                batches = self._batches(epoch) if batches is None else batches
                drawn = list(itertools.islice(batches, _BLOCK))
            if not drawn:
                return
            yield drawn

    def _batches(self, epoch: int) -> Iterator[list[Any]]:
        source = self._source
        if source.batch_sampler is not None:
            set_epoch(source.batch_sampler, epoch)
            yield from map(list, source.batch_sampler)
            return
        set_epoch(source.sampler, epoch)
        keys = iter(source.sampler)
        while batch := list(itertools.islice(keys, self._batch_size)):
            if not (source.drop_last and len(batch) < self._batch_size):
                yield batch


def set_epoch(given: Any, epoch: int) -> None:
    """Tell a loader, a sampler or a stream, and what it takes its order from, the epoch, counted from 0. Local.

    As those who train with a DistributedSampler do before each epoch.
    """
    for one in (given, *(getattr(given, name, None) for name in ("dataset", "sampler", "batch_sampler"))):
        for with_epoch in (one, getattr(one, "sampler", None)):
            set_it = getattr(with_epoch, "set_epoch", None)
            if callable(set_it):
                set_it(epoch - 1)

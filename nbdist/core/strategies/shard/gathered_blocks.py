"""Blocks over any channel: all-gathered into new memory, which is freed; gradients are reduce-scattered."""

from __future__ import annotations

import functools

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.params.placement import shard_of
from nbdist.core.strategies.shard.collective_sequence import GATHER, REDUCE, CollectiveSequence, Need
from nbdist.core.strategies.shard.whole_blocks import SumsOf, WholeBlocks

__all__ = ["GatheredBlocks"]


class GatheredBlocks(WholeBlocks):
    """Each gather allocates new memory, so a view that the user keeps stays valid.

    Args:
        channel: The ``shard`` axis.
        sums_of: See `SumsOf`.
    """

    def __init__(self, channel: Channel, sums_of: SumsOf) -> None:
        self._channel = channel
        self._sums_of = sums_of
        self._sequence = CollectiveSequence(channel, self._serve)
        self._lengths: dict[int, list[int]] = {}
        # By block: for each dtype the indices of its parameters, and their shards in one flat tensor, which is sent.
        self._runs: dict[int, list[tuple[list[int], torch.Tensor]]] = {}

    def shard(self, number: int, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """See `WholeBlocks`."""
        channel = self._channel
        lengths = self._lengths[number] = [-(-p.numel() // channel.size) for p in parameters]
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, parameter in enumerate(parameters):
            by_dtype.setdefault(parameter.dtype, []).append(i)
        shards: dict[int, torch.Tensor] = {}
        self._runs[number] = []
        for members in by_dtype.values():
            run = parameters[members[0]].data.new_zeros(sum(lengths[i] for i in members))
            for i, place in zip(members, run.split([lengths[i] for i in members]), strict=True):
                shards[i] = place.copy_(shard_of(parameters[i].data, channel.rank, channel.size))
            self._runs[number].append((members, run))
        return [shards[i] for i in range(len(parameters))]

    def begin(self, phase: str) -> None:
        """See `WholeBlocks`. Local: where it matters, a gather waits."""
        self._sequence.begin(phase)

    def gather(self, number: int) -> list[torch.Tensor]:
        """See `WholeBlocks`."""
        return self._sequence.run(Need(GATHER, number), functools.partial(self._gather, number))

    def _gather(self, number: int) -> list[torch.Tensor]:
        wholes: dict[int, torch.Tensor] = {}
        for members, run in self._runs[number]:
            lengths = [self._lengths[number][i] for i in members]
            rows = [row.split(lengths) for row in self._channel.all_gather(run)]
            for i, *shards in zip(members, *rows, strict=True):
                wholes[i] = torch.cat(shards)
        return [wholes[i] for i in range(len(wholes))]

    def reduce(self, number: int, gradients: dict[int, torch.Tensor | None]) -> None:
        """See `WholeBlocks`."""
        self._sequence.run(Need(REDUCE, number), functools.partial(self._reduce, number, gradients))

    def _reduce(self, number: int, gradients: dict[int, torch.Tensor | None]) -> None:
        sums = self._sums_of(number)
        for members, run in self._runs[number]:
            trained = [i for i in members if i in sums]
            if not trained:
                continue
            lengths = [self._lengths[number][i] for i in trained]
            rows = run.new_zeros((self._channel.size, sum(lengths)))
            for i, place in zip(trained, rows.split(lengths, 1), strict=True):
                gradient = gradients.get(i)
                if gradient is not None:
                    padded = gradient.new_zeros(place.numel())
                    padded[: gradient.numel()] = gradient.reshape(-1)
                    place.copy_(padded.view_as(place))
            for i, total in zip(trained, self._channel.reduce_scatter(rows.view(-1)).split(lengths), strict=True):
                sums[i].add_(total)

    @torch.no_grad()
    def _serve(self, need: Need) -> None:
        if need.kind == GATHER:
            self._gather(need.number)
        else:
            self._reduce(need.number, {})

    def settle(self) -> None:
        """See `WholeBlocks`."""
        self._sequence.settle()

    def end(self, phase: str) -> None:
        """See `WholeBlocks`."""
        self._sequence.end()

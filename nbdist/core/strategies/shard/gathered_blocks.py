"""Blocks over any channel: all-gathered into new memory, which is freed; gradients are reduce-scattered."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from nbdist.core.comm import Channel
from nbdist.core.params.placement import shard_of
from nbdist.core.strategies.shard.whole_blocks import WholeBlocks, order_error

__all__ = ["GatheredBlocks"]

_HEADER = 16
"""Elements before each rank's shards in an all-gather, a cache line. The first one is the mark of the block."""


class GatheredBlocks(WholeBlocks):
    """Each gather allocates new memory, so a view that the user keeps stays valid.

    Args:
        channel: The ``shard`` axis.
        names: The name of each block's first parameter, for errors.
    """

    def __init__(self, channel: Channel, names: list[str]) -> None:
        self._channel = channel
        self._names = names
        self._lengths: dict[int, list[int]] = {}
        # By block: for each dtype the indices of its parameters, and their shards in one flat tensor, which is sent.
        self._runs: dict[int, list[tuple[list[int], torch.Tensor]]] = {}
        self._mismatches: dict[int, Any] = {}  # by block, whether another rank gathered another one: on the device

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
            run = parameters[members[0]].data.new_zeros(_HEADER + sum(lengths[i] for i in members))
            run[0] = _mark(number)
            for i, place in zip(members, run[_HEADER:].split([lengths[i] for i in members]), strict=True):
                shards[i] = place.copy_(shard_of(parameters[i].data, channel.rank, channel.size))
            self._runs[number].append((members, run))
        return [shards[i] for i in range(len(parameters))]

    def gather(self, number: int) -> list[torch.Tensor]:
        """See `WholeBlocks`."""
        wholes: dict[int, torch.Tensor] = {}
        for members, run in self._runs[number]:
            lengths = [self._lengths[number][i] for i in members]
            gathered = self._channel.all_gather(run)
            self._check_marks(number, gathered, run)
            rows = [row[_HEADER:].split(lengths) for row in gathered]
            for i, *shards in zip(members, *rows, strict=True):
                wholes[i] = torch.cat(shards)
        return [wholes[i] for i in range(len(wholes))]

    def _check_marks(self, number: int, gathered: list[torch.Tensor], run: torch.Tensor) -> None:
        """Compare the marks of all ranks."""
        channel = self._channel
        if channel.device.type == "cpu":
            # Each rank compares with its neighbour: together they compare all.
            if gathered[(channel.rank + 1) % channel.size][0].item() != _mark(number):
                raise order_error(self._names[number])
        else:  # on the GPU without waiting for it; `end` reads it
            differs = (torch.stack([row[0] for row in gathered]) != run[0]).any()
            self._mismatches[number] = self._mismatches.get(number, False) | differs

    def reduce(self, number: int, gradients: dict[int, torch.Tensor | None], sums: dict[int, torch.Tensor]) -> None:
        """See `WholeBlocks`."""
        for members, run in self._runs[number]:
            trained = [i for i in members if i in gradients]
            if not trained:
                continue
            lengths = [self._lengths[number][i] for i in trained]
            rows = run.new_zeros((self._channel.size, sum(lengths)))
            for i, place in zip(trained, rows.split(lengths, 1), strict=True):
                gradient = gradients[i]
                if gradient is not None:
                    padded = gradient.new_zeros(place.numel())
                    padded[: gradient.numel()] = gradient.reshape(-1)
                    place.copy_(padded.view_as(place))
            for i, total in zip(trained, self._channel.reduce_scatter(rows.view(-1)).split(lengths), strict=True):
                sums[i].add_(total)

    def end(self) -> None:
        """See `WholeBlocks`; no rank waits here."""
        mismatches, self._mismatches = self._mismatches, {}
        for number, mismatch in mismatches.items():
            if mismatch:
                raise order_error(self._names[number])


def _mark(number: int) -> int:
    """What marks a block in its all-gather: exact in every dtype."""
    return 1 + number % 127

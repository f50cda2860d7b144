"""Blocks on one host: the shards of all ranks lie side by side in memory that every rank maps, so they are whole there.

A gather copies nothing and waits for nobody. Ranks wait for each other before a step, since owners have written their
shards, and at each sum. They need not compute the same blocks, nor in the same order: at a sum each rank publishes
whose gradients it has, and one whose step is done takes part in the sums of the others until all are.
"""

from __future__ import annotations

import itertools
import mmap
from typing import NamedTuple

import torch
from torch import nn

from nbdist.core.comm import SharedMemoryChannel, comm_timer
from nbdist.core.comm.collective_tag import tag_of
from nbdist.core.strategies.shard.whole_blocks import TRAINING, SumsOf, WholeBlocks, written_error

__all__ = ["MappedBlocks"]

_ALIGNMENT = 64  # bytes: each parameter begins a cache line, as a tensor with its own memory would
_IN_CACHE = 1 << 16
"""Elements that are added at a time, so that the sum of two ranks is still in the cache when a third is added."""
_SMALL_BYTES = 1 << 22
"""Blocks up to this size wait in the slab and are added together, because at each sum ranks wait for each other."""

_BEGIN = tag_of("the start of a step or an evaluation, of sharded blocks")
_SUM = tag_of("the sum of sharded blocks' gradients")


class _Place(NamedTuple):
    """Where one parameter lies.

    Args:
        start: The first byte of all its shards, in rank order: in the common memory, counted from its block's.
        length: Elements of a shard.
        layout: Its dtype and shape, without memory.
    """

    start: int
    length: int
    layout: torch.Tensor

    def part(self, memory: torch.Tensor, rank: int) -> torch.Tensor:
        """The shard of a rank in the memory of the block, without padding."""
        nbytes = self.length * self.layout.itemsize
        stop = min((rank + 1) * nbytes, self.layout.nbytes)
        return memory[self.start + min(rank * nbytes, stop) : self.start + stop].view(self.layout.dtype)


class _Waiting(NamedTuple):
    """A block whose gradients are in the slabs, and not added yet.

    Args:
        number: The block.
        start: Its first byte in a slab.
        own: This rank's shards of the gradients, None where there is none; by the parameter's index in the block.
    """

    number: int
    start: int
    own: dict[int, torch.Tensor | None]


class MappedBlocks(WholeBlocks):
    """Forward and backward read a private (copy-on-write) mapping of the weights, the optimizer writes the shared one.

    So a forward that writes to a weight harms no other rank and no snapshot: it is refused at the end of the step,
    however it has written, and its pages are given up.

    To reduce a block, each rank copies its gradients into its slab, where the others read what they own of them. A slab
    holds the largest block and some small ones, which wait in it until it is full or the step ends. Then each rank adds
    up what it owns of the blocks that any rank has.

    **Collective**: the constructor.

    Args:
        blocks: The parameters of each block.
        channel: The ``shard`` axis.
        names: The name of each parameter, for errors.
        sums_of: See `SumsOf`.
    """

    def __init__(
        self, blocks: list[list[nn.Parameter]], channel: SharedMemoryChannel, names: dict[nn.Parameter, str],
        sums_of: SumsOf,
    ) -> None:  # fmt: skip
        self._channel = channel
        self._sums_of = sums_of
        self._names = [[names[parameter] for parameter in block] for block in blocks]
        self._blocks: list[list[_Place]] = []
        sizes = []
        for block in blocks:
            places, end = [], 0
            for parameter in block:
                length = -(-parameter.numel() // channel.size)
                places.append(_Place(end, length, torch.empty_like(parameter, device="meta", requires_grad=False)))
                end += _aligned(length * channel.size * parameter.itemsize)
            self._blocks.append(places)
            sizes.append(end)
        starts = list(itertools.accumulate(sizes, initial=0))
        self._extents = list(itertools.pairwise(starts))
        self._memory = channel.common_memory(starts[-1])
        self._wholes = [
            [_tensor(self._memory.private, start + place.start, place.layout) for place in places]
            for places, start in zip(self._blocks, starts, strict=False)
        ]
        # The head of a slab: whether its rank's step is done, how many blocks are in it, the number and the first byte
        # of each; then for each parameter whether it has a gradient.
        numbers, flags = 8 * (2 + 2 * len(blocks)), sum(map(len, blocks))
        self._capacity = max(sizes, default=0) + _SMALL_BYTES
        self._slab = channel.zeros(_aligned(numbers + flags) + self._capacity, torch.uint8)
        slabs = channel.slabs(self._slab)
        self._contents = [slab[:numbers].view(torch.int64) for slab in slabs]
        self._flags = [list(slab[numbers : numbers + flags].split([len(block) for block in blocks])) for slab in slabs]
        self._slabs = [slab[_aligned(numbers + flags) :] for slab in slabs]
        self._waiting: list[_Waiting] = []
        self._filled = 0
        self._closed = False

    def shard(self, number: int, parameters: list[nn.Parameter]) -> list[torch.Tensor]:
        """See `WholeBlocks`."""
        rank, shards = self._channel.rank, []
        memory = self._memory.shared[slice(*self._extents[number])]
        for place, parameter in zip(self._blocks[number], parameters, strict=True):
            nbytes = place.length * place.layout.itemsize
            first = place.start + rank * nbytes
            values = parameter.data.reshape(-1)[rank * place.length : (rank + 1) * place.length]
            shards.append(memory[first : first + nbytes].view(place.layout.dtype))
            shards[-1][: len(values)] = values
        return shards

    def begin(self, phase: str) -> None:
        """See `WholeBlocks`: the owners have written."""
        self._waiting.clear()  # of a step that has failed
        self._filled = 0
        self._channel.barrier(_BEGIN)

    def gather(self, number: int) -> list[torch.Tensor]:
        """See `WholeBlocks`: the memory is the same each time. Local."""
        return self._wholes[number]

    @comm_timer.communicating()
    def reduce(self, number: int, gradients: dict[int, torch.Tensor | None]) -> None:
        """See `WholeBlocks`; a small block is added later, at the latest in `end`."""
        start, stop = self._extents[number]
        if self._filled + stop - start > self._capacity or any(number == waiting.number for waiting in self._waiting):
            self._add_up()
        rank, large = self._channel.rank, stop - start > _SMALL_BYTES
        region = self._slabs[rank][self._filled :]
        own: dict[int, torch.Tensor | None] = {}
        targets, sources = [], []
        for i, gradient in gradients.items():
            place = self._blocks[number][i]
            flat = None if gradient is None else gradient.reshape(-1)
            if flat is None or not len(flat):
                own[i] = flat
            elif large:  # added at once, so what this rank owns need not be copied
                own[i] = flat[rank * place.length : (rank + 1) * place.length].to(place.layout.dtype)
                for other in range(self._channel.size):
                    if other != rank:
                        targets.append(place.part(region, other))
                        sources.append(flat[other * place.length : (other + 1) * place.length])
            else:
                own[i] = place.part(region, rank)
                targets.append(region[place.start : place.start + place.layout.nbytes].view(place.layout.dtype))
                sources.append(flat)
        if targets:
            torch._foreach_copy_(targets, sources)
        self._waiting.append(_Waiting(number, self._filled, own))
        self._filled += stop - start
        if large:
            self._add_up()

    def _add_up(self, *, done: bool = False) -> bool:
        """Add the gradients that wait in the slabs of any rank. **Collective**.

        Args:
            done: Whether this rank's step is done.

        Returns:
            Whether the steps of all ranks are.
        """
        channel, waiting = self._channel, {block.number: block for block in self._waiting}
        for block in self._waiting:
            given = [block.own.get(i) is not None for i in range(len(self._blocks[block.number]))]
            self._flags[channel.rank][block.number].copy_(torch.tensor(given))
        contents = [int(done), len(waiting), *(n for block in self._waiting for n in (block.number, block.start))]
        self._contents[channel.rank][: len(contents)] = torch.tensor(contents)
        channel.barrier(_SUM)
        published = [contents.tolist() for contents in self._contents]
        starts = [dict(zip(numbers[2 : 2 + 2 * numbers[1] : 2], numbers[3::2], strict=False)) for numbers in published]
        owns: list[torch.Tensor] = []
        terms: list[list[torch.Tensor]] = [[] for _ in range(channel.size)]
        for number in dict.fromkeys(itertools.chain(waiting, *starts)):
            flags = [
                self._flags[rank][number].tolist() if number in places else None for rank, places in enumerate(starts)
            ]
            mine = waiting[number].own if number in waiting else {}
            for i, own in self._sums_of(number).items():
                place = self._blocks[number][i]
                parts: list[torch.Tensor] = []
                for rank, (has, slab) in enumerate(zip(flags, self._slabs, strict=True)):
                    if has is None or not has[i]:
                        continue
                    part = mine.get(i) if rank == channel.rank else None
                    parts.append(place.part(slab[starts[rank][number] :], channel.rank) if part is None else part)
                if not parts:
                    continue
                own = own[: len(parts[0])]
                if len(parts) < channel.size or len(own) > _IN_CACHE:
                    _add_sum(own, parts)
                    continue
                owns.append(own)
                for column, part in zip(terms, parts, strict=True):
                    column.append(part)
        if owns:
            totals = terms[0]
            for column in terms[1:]:
                totals = list(torch._foreach_add(totals, column))
            torch._foreach_add_(owns, totals)
        self._waiting, self._filled = [], 0
        all_done = all(numbers[0] for numbers in published)
        if not all_done:
            channel.barrier(_SUM)  # the slabs may be written again
        return all_done

    @comm_timer.communicating()
    def settle(self) -> None:
        """See `WholeBlocks`: a forward that differentiates itself has sums too, and not as many on each rank."""
        while not self._add_up(done=True):
            pass
        self._channel.barrier(_SUM)  # the slabs may be written again

    def end(self, phase: str) -> None:
        """See `WholeBlocks`."""
        if phase != TRAINING:
            return
        with comm_timer.communicating():
            while not self._add_up(done=True):
                pass
        pages = self._memory.own_pages()
        if pages == []:
            return
        names = [] if pages is None else self._written(pages)
        self._memory.drop_own_pages()
        if names:
            raise written_error(names[0])

    def _written(self, pages: list[int]) -> list[str]:
        """The names of the parameters whose private values differ from the common ones. Local."""
        names = []
        for places, own, (first, _) in zip(self._blocks, self._names, self._extents, strict=True):
            for place, name in zip(places, own, strict=True):
                start, stop = first + place.start, first + place.start + place.layout.nbytes
                if any(page < stop and start < page + mmap.PAGESIZE for page in pages):
                    here, there = self._memory.private[start:stop], self._memory.shared[start:stop]
                    if not torch.equal(here, there):
                        names.append(name)
        return names

    def close(self) -> None:
        """See `WholeBlocks`."""
        if not self._closed:
            self._channel.free(self._slab)
        self._closed = True


def _tensor(memory: torch.Tensor, start: int, layout: torch.Tensor) -> torch.Tensor:
    """A parameter in common memory, flat, with a storage of its own: autograd's saved tensors are known by storage."""
    made = torch.empty(0, dtype=layout.dtype)
    if layout.numel():
        made.set_(memory.untyped_storage()[start : start + layout.nbytes])
    return made


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _add_sum(own: torch.Tensor, terms: list[torch.Tensor]) -> None:
    """Add ((t0 + t1) + t2) + ... to `own`. Local."""
    for part, first, *others in zip(own.split(_IN_CACHE), *(term.split(_IN_CACHE) for term in terms), strict=True):
        total = first
        for i, other in enumerate(others):
            total = total.add_(other) if i else total + other
        part.add_(total)

"""Distributed data loading: the slices of each global batch that this rank reads (cf. DistributedSampler)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import data as torch_data

from nbdist.core.comm import Channel
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.data.sources import Source, map_tensors, tensors_in
from nbdist.core.data.workers import EndsWithRank
from nbdist.core.process import rng
from nbdist.plan import slice_bounds

__all__ = ["Reader", "Slice", "to_device"]

_CPU = torch.device("cpu")
_RESIDENT_SHARE = 8
"""Tensors that take less than this fraction (1/8) of a GPU's free memory are kept there during a run."""
_SliceRows = tuple[int, torch.Tensor, int, int, int]
"""A slice's index, positions in the source and number of samples, that of its batch, and its first place."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A fixed part of a global batch, one forward and backward.

    Args:
        index: Which of the batch's slices, 0 ... ranks x microbatches - 1, counted over all ranks.
        samples: Samples in it; 0 for a padding slice, with another's data, so that all ranks run the same collectives.
        batch: The step's `batch`, before it is moved to the device.
        target: Returns the last element of `batch` on the CPU, to be counted without waiting for the GPU; None where
            `batch` itself is on the CPU.
        of: Number of slices of its batch, over all ranks.
        batch_samples: Samples of its batch, over all ranks; 0 if it is the whole batch.
        first: Place of its first sample among those of the epoch, counted over all ranks from 0.
        stride: From one sample's place to the next one's.
    """

    index: int
    samples: int
    batch: Any
    target: Callable[[], torch.Tensor] | None = None
    of: int = 1
    batch_samples: int = 0
    first: int = 0
    stride: int = 1

    @property
    def places(self) -> range:
        """The places of its samples in the epoch."""
        return range(self.first, self.first + self.samples * self.stride, self.stride)


class Reader:
    """Distributes a source over the ranks of one channel.

    The sample order is a function of (seed, epoch). Each global batch is cut into contiguous slices, and each rank
    reads a range of them, so the ranks of a mesh read exactly what one process with as many microbatches would. Of a
    stream, rank r of N reads elements r, r + N, ...; with `stream_by_slice`, slice i of M has elements i, i + M, ...

    Args:
        source: The data, the same on every rank.
        channel: The axis over which the data is distributed.
        batch_size: Global batch size.
        slices: Slices per batch, over all ranks; by default one per rank.
        seed: Seed of the sample order, and of the data set's random numbers.
        shuffle: Whether to read in a new order each epoch.
        device: Where the step computes. For a GPU, small tensors are kept on it; else each batch is read into pinned
            memory.
        sampler_channel: Over all ranks that read the same epochs, for a sampler's order; by default `channel`.
        pad: Whether every rank gets as many slices as any other: padding slices have 0 samples, and another's data.
        stream_by_slice: Whether the content of a stream's slices must not depend on the number of ranks.
    """

    def __init__(
        self, source: Source, channel: Channel, *, batch_size: int, slices: int = 0, seed: int = 0,
        shuffle: bool = False, device: torch.device = _CPU, sampler_channel: Channel | None = None,
        pad: bool = False, stream_by_slice: bool = False,
    ) -> None:  # fmt: skip
        self._source = source
        self._channel = channel
        self._sampler_channel = sampler_channel or channel
        self._pad = pad
        self._batch_size = batch_size
        self._slices = slices or channel.size
        self._share = ReductionTree.share(self._slices, channel.rank, channel.size)
        self._stream_by_slice = stream_by_slice
        self._seed = seed
        self._shuffle = shuffle
        self._device = device
        self._resident: Any = None
        self._requests: list[list[int]] = []
        self._loader: Any = None
        self._sampled = 0  # epochs for which the source's own sampler has run

    @property
    def steps(self) -> int | None:
        """Batches per epoch; None if the data has no length."""
        samples = self._source.samples
        if samples is None:
            return None
        return samples // self._batch_size if self._source.drop_last else -(-samples // self._batch_size)

    @property
    def streams(self) -> bool:
        """Whether the length of an epoch is unknown: after its last batch a rank then reads None, again and again."""
        return self._source.stream is not None

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[list[Slice] | None]:
        """This rank's slices of each batch, in order; empty if a short batch has no samples for this rank.

        **Collective** if the source has its own sampler: rank 0 runs it and broadcasts the order.

        Args:
            epoch: Counted from 1.
            skip: Batches to skip at the beginning; the others are the same as without.
        """
        if self.streams:
            return self._stream(epoch, skip)
        order = self._order(epoch)
        return self._index(order, skip) if self._source.tensors is not None else self._load(order, epoch, skip)

    def _order(self, epoch: int) -> torch.Tensor:
        source, samples = self._source, self._source.samples
        assert samples is not None
        if source.sampler is not None:
            order = torch.empty(0, dtype=torch.long)
            if self._sampler_channel.rank == 0:
                # Earlier epochs too, after a resume: the sampler may have its own generator, which must advance.
                for passed in range(self._sampled + 1, epoch + 1):
                    order = self._sample(passed, samples)
                if self._sampled >= epoch:
                    order = self._sample(epoch, samples)
                self._sampled = max(self._sampled, epoch)
            data = self._sampler_channel.broadcast_bytes(order.numpy().tobytes())
            return torch.frombuffer(bytearray(data), dtype=torch.long) if data else order
        if not self._shuffle:
            return torch.arange(samples)
        return torch.randperm(samples, generator=torch.Generator().manual_seed(rng.derive(self._seed, "order", epoch)))

    def _sample(self, epoch: int, samples: int) -> torch.Tensor:
        with rng.fork_rng(torch.device("cpu")):  # so that the order is the same after a resume
            rng.seed_all(rng.derive(self._seed, "sampler", epoch))
            return torch.tensor(list(itertools.islice(self._source.sampler, samples)), dtype=torch.long)

    def _slices_of(self, order: torch.Tensor) -> Iterator[list[_SliceRows]]:
        """This rank's slices of each batch."""
        share, begin = self._share, -self._batch_size
        for batch in order.split(self._batch_size):
            begin += self._batch_size
            if self._source.drop_last and len(batch) < self._batch_size:
                return
            bounds = slice_bounds(len(batch), self._slices)
            mine = ((index, bounds[index]) for index in share)
            total = len(batch)
            slices = [
                (index, batch[start:stop], stop - start, total, begin + start)
                for index, (start, stop) in mine
                if stop > start
            ]
            if self._pad:
                most = sum(stop > start for start, stop in bounds[: len(share)])  # the first rank has the most slices
                rows = batch[slice(*bounds[0])]
                slices += [(share.start + i, rows, 0, total, begin) for i in range(len(slices), most)]
            yield slices

    def _index(self, order: torch.Tensor, skip: int) -> Iterator[list[Slice]]:
        tensors, indices = self._source.tensors, self._source.indices
        rows = order if indices is None else indices[order]
        if self._device.type == "cpu":
            for batch in itertools.islice(self._slices_of(rows), skip, None):
                yield [
                    self._slice(index, samples, total, first, _rows(tensors, positions))
                    for index, positions, samples, total, first in batch
                ]
            return
        resident = self._keep_resident()
        target = tensors[-1] if isinstance(tensors, tuple) else None
        both = zip(self._slices_of(rows), self._slices_of(rows.to(self._device)), strict=True)
        for batch, on_device in itertools.islice(both, skip, None):
            slices = []
            for (index, positions, samples, total, first), moved in zip(batch, on_device, strict=True):
                if resident is None:
                    pinned = map_tensors(_rows(tensors, positions), torch.Tensor.pin_memory)
                    slices.append(self._slice(index, samples, total, first, pinned))
                else:
                    read = None if target is None else functools.partial(target.__getitem__, positions)
                    slices.append(self._slice(index, samples, total, first, _rows(resident, moved[1]), read))
            yield slices

    def _keep_resident(self) -> Any:
        """The tensors on the device; None if they would take too much of its memory."""
        tensors = self._source.tensors
        if self._resident is None:
            free, _ = torch.cuda.mem_get_info(self._device)
            if sum(tensor.nbytes for tensor in tensors_in(tensors)) <= free / _RESIDENT_SHARE:
                self._resident = map_tensors(tensors, lambda tensor: tensor.to(self._device))
        return self._resident

    def _load(self, order: torch.Tensor, epoch: int, skip: int) -> Iterator[list[Slice]]:
        batches = list(itertools.islice(self._slices_of(order), skip, None))
        self._requests[:] = [
            [rng.derive(self._seed, "data", epoch, step, index), *positions.tolist()]
            for step, batch in enumerate(batches, start=skip)
            for index, positions, *_ in batch
        ]
        if self._loader is None:
            self._loader = torch_data.DataLoader(
                _Seeded(self._source.dataset), batch_sampler=_Requests(self._requests), collate_fn=self._source.collate,
                pin_memory=self._device.type == "cuda",
                persistent_workers=bool(self._source.loading.get("num_workers")), **_loading(self._source),
            )  # fmt: skip
        loaded = iter(self._loader)
        for batch in batches:
            yield [self._slice(index, samples, total, first, next(loaded)) for index, _, samples, total, first in batch]

    def _stream(self, epoch: int, skip: int) -> Iterator[list[Slice] | None]:
        readers = self._slices if self._stream_by_slice else self._channel.size  # slices, or ranks
        each = self._slices // readers
        mine = self._share if self._stream_by_slice else [self._channel.rank]
        rng.seed_all(rng.derive(self._seed, "stream", epoch))
        loader = torch_data.DataLoader(
            self._source.stream, batch_size=None, collate_fn=_as_it_is, **_loading(self._source)
        )
        elements = iter(loader)
        for step in itertools.count():
            rng.seed_all(rng.derive(self._seed, "data", epoch, step))
            batch = list(itertools.islice(elements, self._batch_size))
            if not batch or (self._source.drop_last and len(batch) < self._batch_size):
                break
            if step < skip:
                continue
            offset = step * self._batch_size
            slices = []
            for reader in mine:
                begin, first = (reader - offset) % readers, reader * each
                taken = batch[begin::readers]
                bounds = slice_bounds(len(taken), each)
                slices += [
                    self._slice(
                        first + i,
                        stop - start,
                        len(batch),
                        offset + begin + start * readers,
                        self._source.collate(taken[start:stop]),
                        stride=readers,
                    )
                    for i, (start, stop) in enumerate(bounds)
                    if stop > start
                ]
                if self._pad:
                    most = slice_bounds(-(-len(batch) // readers), each)  # the largest number on any rank
                    padding = self._source.collate((taken or batch)[:2])
                    filled = sum(stop > start for start, stop in most)
                    slices += [self._slice(first + i, 0, len(batch), 0, padding) for i in range(len(slices), filled)]
            yield slices
        yield from itertools.repeat(None)

    def _slice(
        self, index: int, samples: int, batch_samples: int, first: int, batch: Any, target: Any = None, stride: int = 1
    ) -> Slice:
        return Slice(
            index=index, samples=samples, batch=batch, target=target, of=self._slices, batch_samples=batch_samples,
            first=first, stride=stride,
        )  # fmt: skip

    def close(self) -> None:
        """End the loader's worker processes, and free the tensors on the device."""
        self._loader = self._resident = None


def _rows(tensors: Any, rows: torch.Tensor) -> Any:
    # `index_select` takes a third of the time of indexing, but a subclass may index otherwise.
    return map_tensors(tensors, lambda t: t.index_select(0, rows) if type(t) is torch.Tensor else t[rows])


def _loading(source: Source) -> dict[str, Any]:
    if not source.loading.get("num_workers"):
        return source.loading
    return {**source.loading, "worker_init_fn": EndsWithRank(source.loading.get("worker_init_fn"))}


def _as_it_is(element: Any) -> Any:
    return element


class _Requests:
    """A batch sampler over a list that is refilled each epoch, so that the loader and its workers can be reused."""

    def __init__(self, requests: list[list[int]]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(self._requests))

    def __len__(self) -> int:
        return len(self._requests)


class _Seeded(torch_data.Dataset[Any]):
    """A map-style data set that reads whole slices, each under the seed in its request."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, request: list[int]) -> list[Any]:
        seed, *positions = request
        rng.seed_all(seed)
        if callable(getattr(self._dataset, "__getitems__", None)):
            return list(self._dataset.__getitems__(positions))
        return [self._dataset[position] for position in positions]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch; objects with a ``to`` method (token batches, graphs) move themselves."""
    if device.type == "cpu":
        return batch
    if type(batch) is dict:
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if type(batch) in (tuple, list):
        return type(batch)(to_device(value, device) for value in batch)
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    return batch.to(device) if callable(getattr(batch, "to", None)) else batch

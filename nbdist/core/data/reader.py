"""Which samples this rank reads, and when."""

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
"""Tensors that take less than this part of what is free on a GPU are kept there for the length of a run."""
_Dealt = tuple[int, torch.Tensor, int]


@dataclass(frozen=True, kw_only=True)
class Slice:
    """A fixed part of a global batch, one forward and backward.

    Args:
        index: Which of the batch's slices, 0 ... ranks x microbatches - 1, counted over all ranks.
        samples: Samples in it; 0 where the batch left none for it and others wait for this rank to compute as they do.
        batch: What the step sees as `batch`, once it is on the device.
        target: Reads its last element where that can be counted without waiting for a GPU; None where `batch` holds it.
        of: Into how many slices its batch is cut, over all ranks.
    """

    index: int
    samples: int
    batch: Any
    target: Callable[[], torch.Tensor] | None = None
    of: int = 1


class Reader:
    """Deals a source out to the ranks of one channel.

    The order of samples is a function of (seed, epoch). Each global batch is cut into contiguous slices, and each rank
    reads some that follow each other, so the ranks of a mesh read just what one process with as many microbatches
    would. Of a stream, rank r reads elements r modulo ranks; `dealt_by_slice`, slice i has elements i modulo slices.

    Args:
        source: The data, the same on every rank.
        channel: The axis that shares the data.
        batch_size: Global batch size.
        slices: Into how many a batch is cut, over all ranks; by default one a rank.
        seed: Decides the order and what data sets draw at random.
        shuffle: Whether to read in a new order each epoch.
        device: What will compute on it. For a GPU, tensors are kept there if they are small, else each batch is read
            into page-locked memory.
        told_by: Over all ranks that read with the same settings; by default those of `channel`.
        even: Whether every rank gets as many slices as any other: without samples, and the data of another one.
        dealt_by_slice: Whether what is in a slice of a stream may not depend on the number of ranks.
    """

    def __init__(
        self, source: Source, channel: Channel, *, batch_size: int, slices: int = 0, seed: int = 0,
        shuffle: bool = False, device: torch.device = _CPU, told_by: Channel | None = None, even: bool = False,
        dealt_by_slice: bool = False,
    ) -> None:  # fmt: skip
        self._source = source
        self._channel = channel
        self._told_by = told_by or channel
        self._even = even
        self._batch_size = batch_size
        self._slices = slices or channel.size
        self._share = ReductionTree.share(self._slices, channel.rank, channel.size)
        self._dealt_by_slice = dealt_by_slice
        self._seed = seed
        self._shuffle = shuffle
        self._device = device
        self._resident: Any = None
        self._requests: list[list[int]] = []
        self._loader: Any = None
        self._sampled = 0  # epochs that the source's own sampler has been run for

    @property
    def steps(self) -> int | None:
        """Batches in one pass; None where the data has no length."""
        samples = self._source.samples
        if samples is None:
            return None
        return samples // self._batch_size if self._source.drop_last else -(-samples // self._batch_size)

    @property
    def streams(self) -> bool:
        """Whether the end of a pass is only known when it comes: an exhausted rank then reads None, again and again."""
        return self._source.stream is not None

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[list[Slice] | None]:
        """This rank's slices of each batch, in order; empty where a short batch leaves nothing for it.

        **Collective** where the source has a sampler of its own: rank 0 runs it and the others are told.

        Args:
            epoch: Which pass, counted from 1.
            skip: Batches to leave out at the beginning; what follows is as if they had been read.
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
            if self._told_by.rank == 0:
                for passed in range(self._sampled + 1, epoch + 1):  # it may draw from a generator of its own
                    order = self._sample(passed, samples)
                if self._sampled >= epoch:
                    order = self._sample(epoch, samples)
                self._sampled = max(self._sampled, epoch)
            told = self._told_by.broadcast_bytes(order.numpy().tobytes())
            return torch.frombuffer(bytearray(told), dtype=torch.long) if told else order
        if not self._shuffle:
            return torch.arange(samples)
        return torch.randperm(samples, generator=torch.Generator().manual_seed(rng.derive(self._seed, "order", epoch)))

    def _sample(self, epoch: int, samples: int) -> torch.Tensor:
        with rng.kept(torch.device("cpu")):  # it runs anew where a training goes on in the middle of an epoch
            rng.seed_all(rng.derive(self._seed, "sampler", epoch))
            return torch.tensor(list(itertools.islice(self._source.sampler, samples)), dtype=torch.long)

    def _deal(self, order: torch.Tensor) -> Iterator[list[_Dealt]]:
        """For each batch, the slices of this rank: index, positions in the source, and samples that count."""
        share = self._share
        for batch in order.split(self._batch_size):
            if self._source.drop_last and len(batch) < self._batch_size:
                return
            bounds = slice_bounds(len(batch), self._slices)
            mine = ((index, bounds[index]) for index in share)
            dealt = [(index, batch[start:stop], stop - start) for index, (start, stop) in mine if stop > start]
            if self._even:
                most = sum(stop > start for start, stop in bounds[: len(share)])  # what the first rank has
                dealt += [(share.start + i, batch[slice(*bounds[0])], 0) for i in range(len(dealt), most)]
            yield dealt

    def _index(self, order: torch.Tensor, skip: int) -> Iterator[list[Slice]]:
        tensors, indices = self._source.tensors, self._source.indices
        rows = order if indices is None else indices[order]
        if self._device.type == "cpu":
            for batch in itertools.islice(self._deal(rows), skip, None):
                yield [
                    Slice(of=self._slices, index=index, samples=samples, batch=_taken(tensors, at))
                    for index, at, samples in batch
                ]
            return
        resident = self._keep_resident()
        target = tensors[-1] if isinstance(tensors, tuple) else None
        dealt = zip(self._deal(rows), self._deal(rows.to(self._device)), strict=True)
        for batch, there in itertools.islice(dealt, skip, None):
            slices = []
            for (index, at, samples), (_, same, _) in zip(batch, there, strict=True):
                if resident is None:
                    taken = map_tensors(_taken(tensors, at), torch.Tensor.pin_memory)
                    slices.append(Slice(of=self._slices, index=index, samples=samples, batch=taken))
                else:
                    seen = None if target is None else functools.partial(target.__getitem__, at)
                    slices.append(
                        Slice(of=self._slices, index=index, samples=samples, batch=_taken(resident, same), target=seen)
                    )
            yield slices

    def _keep_resident(self) -> Any:
        """The tensors on the device; None where they would take too much of it."""
        tensors = self._source.tensors
        if self._resident is None:
            free, _ = torch.cuda.mem_get_info(self._device)
            if sum(tensor.nbytes for tensor in tensors_in(tensors)) <= free / _RESIDENT_SHARE:
                self._resident = map_tensors(tensors, lambda tensor: tensor.to(self._device))
        return self._resident

    def _load(self, order: torch.Tensor, epoch: int, skip: int) -> Iterator[list[Slice]]:
        dealt = list(itertools.islice(self._deal(order), skip, None))
        self._requests[:] = [
            [rng.derive(self._seed, "data", epoch, step, index), *positions.tolist()]
            for step, batch in enumerate(dealt, start=skip)
            for index, positions, _ in batch
        ]
        if self._loader is None:
            self._loader = torch_data.DataLoader(
                _Seeded(self._source.dataset), batch_sampler=_Requests(self._requests), collate_fn=self._source.collate,
                pin_memory=self._device.type == "cuda",
                persistent_workers=bool(self._source.loading.get("num_workers")), **_loading(self._source),
            )  # fmt: skip
        loaded = iter(self._loader)
        for batch in dealt:
            yield [
                Slice(of=self._slices, index=index, samples=samples, batch=next(loaded)) for index, _, samples in batch
            ]

    def _stream(self, epoch: int, skip: int) -> Iterator[list[Slice] | None]:
        hands = self._slices if self._dealt_by_slice else self._channel.size
        each = self._slices // hands
        mine = self._share if self._dealt_by_slice else [self._channel.rank]
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
            for hand in mine:
                dealt, first = batch[(hand - offset) % hands :: hands], hand * each
                bounds = slice_bounds(len(dealt), each)
                slices += [
                    Slice(
                        of=self._slices,
                        index=first + i,
                        samples=stop - start,
                        batch=self._source.collate(dealt[start:stop]),
                    )
                    for i, (start, stop) in enumerate(bounds)
                    if stop > start
                ]
                if self._even:
                    most = slice_bounds(-(-len(batch) // hands), each)  # what some rank has
                    spare = self._source.collate((dealt or batch)[:2])
                    filled = sum(stop > start for start, stop in most)
                    slices += [
                        Slice(of=self._slices, index=first + i, samples=0, batch=spare)
                        for i in range(len(slices), filled)
                    ]
            yield slices
        yield from itertools.repeat(None)

    def close(self) -> None:
        """End the loader's worker processes, and let go of what is on the device."""
        self._loader = self._resident = None


def _taken(tensors: Any, rows: torch.Tensor) -> Any:
    return map_tensors(tensors, lambda tensor: tensor[rows])


def _loading(source: Source) -> dict[str, Any]:
    if not source.loading.get("num_workers"):
        return source.loading
    return {**source.loading, "worker_init_fn": EndsWithRank(source.loading.get("worker_init_fn"))}


def _as_it_is(element: Any) -> Any:
    return element


class _Requests:
    """A batch sampler over a list that is filled anew each epoch, so that the loader and its workers live on."""

    def __init__(self, requests: list[list[int]]) -> None:
        self._requests = requests

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(self._requests))

    def __len__(self) -> int:
        return len(self._requests)


class _Seeded(torch_data.Dataset[Any]):
    """A map-style data set asked for whole slices, each with the seed it is to be read under."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, request: list[int]) -> list[Any]:
        seed, *positions = request
        rng.seed_all(seed)
        if callable(getattr(self._dataset, "__getitems__", None)):
            return list(self._dataset.__getitems__(positions))
        return [self._dataset[position] for position in positions]


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch; objects with a ``to`` of their own (token batches, graphs) move themselves."""
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

"""Distributed data loading: the slices of each global batch that this rank reads (cf. DistributedSampler)."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import data as torch_data

from nbdist.core.comm import Channel
from nbdist.core.comm.reduction_order import ReductionTree
from nbdist.core.data.cut_batches import CutBatches
from nbdist.core.data.excerpt import Excerpt
from nbdist.core.data.feed import Feed
from nbdist.core.data.sampler_runs import SamplerRuns
from nbdist.core.data.sources import Source, map_tensors, tensors_in
from nbdist.core.data.workers import SeededSlices, loading_of, started
from nbdist.core.process import rng
from nbdist.plan import slice_bounds

__all__ = ["Reader", "Slice", "copy_batch", "to_device"]

_CPU = torch.device("cpu")
_RESIDENT_SHARE = 8
"""Tensors that take less than this fraction (1/8) of a GPU's free memory are kept there during a run."""


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
    """

    index: int
    samples: int
    batch: Any
    target: Callable[[], torch.Tensor] | None = None
    of: int = 1
    batch_samples: int = 0
    first: int = 0

    @property
    def places(self) -> range:
        """The places of its samples in the epoch."""
        return range(self.first, self.first + self.samples)


class Reader:
    """Distributes a source over the ranks of one channel.

    The sample order is a function of (seed, epoch). Each global batch is cut into contiguous slices, and each rank
    reads a range of them, so the ranks of a mesh read exactly what one process with as many microbatches would. Streams
    and ready-made batches are read by rank 0 alone, which sends each rank its slices; so an epoch ends after the same
    step on all ranks, whatever the data does.

    Args:
        source: The data, the same on every rank; rank 0's where it alone reads.
        channel: The axis over which the data is distributed.
        batch_size: Global batch size.
        slices: Slices per batch, over all ranks; by default one per rank.
        seed: Seed of the sample order, and of the data set's random numbers.
        shuffle: Whether to read in a new order each epoch.
        device: Where the step computes. For a GPU, small tensors are kept on it; else each batch is read into pinned
            memory.
        feed: From rank 0 to all ranks that read the same epochs, for what it alone reads.
        pad: Whether every rank gets as many slices as any other: padding slices have 0 samples, and another's data.
        excerpt: Cuts epochs short.
    """

    def __init__(
        self, source: Source, channel: Channel, *, batch_size: int, slices: int = 0, seed: int = 0,
        shuffle: bool = False, device: torch.device = _CPU, feed: Feed | None = None, pad: bool = False,
        excerpt: Excerpt | None = None,
    ) -> None:  # fmt: skip
        self._source = source
        self._feed = feed or Feed()
        self._pad = pad
        self._excerpt = excerpt
        self._batch_size = batch_size
        self._slices = slices or channel.size
        self._places = channel.size
        self._share = ReductionTree.share(self._slices, channel.rank, channel.size)
        self._seed = seed
        self._shuffle = shuffle
        self._device = device
        self._resident: Any = None
        self._requests = _Requests()
        self._loader: Any = None
        self._sampler = SamplerRuns(source, batch_size, seed)

    @property
    def steps(self) -> int | None:
        """Batches per epoch; None if the data has no length."""
        return self._source.steps(self._batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[list[Slice]]:
        """This rank's slices of each batch, in order; empty if a short batch has no samples for this rank.

        **Collective** if rank 0 reads the source, or runs its sampler, for all.

        Args:
            epoch: Counted from 1.
            skip: Batches to skip at the beginning; the others are the same as without.
        """
        if self._source.tensors is not None:
            batches = self._index(epoch, skip)
        else:
            batches = self._fed(epoch, skip) if self._source.dataset is None else self._load(epoch, skip)
        return batches if self._excerpt is None else self._excerpt.of(batches)

    def _batches(self, epoch: int, skip: int) -> Iterator[Any]:
        """The samples of each global batch: rows as a tensor, or keys as a list."""
        order = self._order(epoch)
        return itertools.islice(self._sampled(epoch) if order is None else self._split(order), skip, None)

    def _order(self, epoch: int) -> torch.Tensor | None:
        """All rows in the order of an epoch; None if a sampler decides it."""
        source, samples = self._source, self._source.samples
        if source.sampler is not None or source.batch_sampler is not None:
            return None
        assert samples is not None
        if not self._shuffle:
            return torch.arange(samples)
        return torch.randperm(samples, generator=torch.Generator().manual_seed(rng.derive(self._seed, "order", epoch)))

    def _split(self, order: torch.Tensor) -> Sequence[torch.Tensor]:
        batches: Sequence[torch.Tensor] = order.split(self._batch_size)
        return batches[:-1] if self._source.drop_last and len(batches[-1]) < self._batch_size else batches

    def _sampled(self, epoch: int) -> Iterator[list[Any]]:
        """The keys of each batch, from the sampler on rank 0. **Collective** now and then, before the same batch."""
        blocks = self._sampler.blocks(epoch) if self._feed.is_first else iter(())
        while (block := self._feed.share(lambda: next(blocks, None))) is not None:
            yield from block

    def _parts(self, samples: int, share: range) -> list[tuple[int, int, int, int]]:
        """The slices of a batch in a rank's share: index, first and last position, and number of samples."""
        bounds = slice_bounds(samples, self._slices)
        parts = [(i, *bounds[i], bounds[i][1] - bounds[i][0]) for i in share if bounds[i][1] > bounds[i][0]]
        if self._pad:
            most = sum(stop > start for start, stop in bounds[: len(share)])  # the first rank has the most slices
            parts += [(share.start + i, *bounds[0], 0) for i in range(len(parts), most)]
        return parts

    def _index(self, epoch: int, skip: int) -> Iterator[list[Slice]]:
        tensors, indices, order = self._source.tensors, self._source.indices, self._order(epoch)
        resident = None if self._device.type == "cpu" else self._keep_resident()
        target = tensors[-1] if isinstance(tensors, tuple) else None
        batches: Iterable[Any]
        if order is None:
            drawn = map(torch.tensor, self._sampled(epoch))
            batches = ((rows if indices is None else indices[rows],) * 2 for rows in drawn)
        else:
            rows = order if indices is None else indices[order]
            batches = zip(
                self._split(rows), self._split(rows if resident is None else rows.to(self._device)), strict=True
            )
        begin = skip * self._batch_size
        for batch, on_device in itertools.islice(batches, skip, None):
            slices = []
            for index, start, stop, samples in self._parts(len(batch), self._share):
                positions, read = batch[start:stop], None
                if resident is not None:
                    taken = _rows(resident, on_device[start:stop].to(self._device))
                    read = None if target is None else functools.partial(target.__getitem__, positions)
                else:
                    taken = _rows(tensors, positions)
                    if self._device.type != "cpu":
                        taken = map_tensors(taken, torch.Tensor.pin_memory)
                slices.append(self._slice(index, samples, len(batch), begin + start, taken, read))
            begin += len(batch)
            yield slices

    def _keep_resident(self) -> Any:
        """The tensors on the device; None if they would take too much of its memory."""
        tensors = self._source.tensors
        if self._resident is None:
            free, _ = torch.cuda.mem_get_info(self._device)
            if sum(tensor.nbytes for tensor in tensors_in(tensors)) <= free / _RESIDENT_SHARE:
                self._resident = map_tensors(tensors, lambda tensor: tensor.to(self._device))
        return self._resident

    def _load(self, epoch: int, skip: int) -> Iterator[list[Slice]]:
        # A loader with workers takes the batches before they are read here, equally many on every rank.
        taken, batches = itertools.tee(self._batches(epoch, skip))
        self._requests.batches = (
            [
                (rng.derive(self._seed, "data", epoch, step, index), _keys(batch[start:stop]))
                for index, start, stop, _ in self._parts(len(batch), self._share)
            ]
            for step, batch in enumerate(taken, start=skip)
        )
        if self._loader is None:
            self._loader = torch_data.DataLoader(
                SeededSlices(self._source.dataset, self._source.collate), batch_sampler=self._requests,
                collate_fn=_as_it_is, pin_memory=self._device.type == "cuda",
                persistent_workers=bool(self._source.loading.get("num_workers")), **loading_of(self._source.loading),
            )  # fmt: skip
        begin = skip * self._batch_size
        for batch, loaded in zip(batches, started(self._loader), strict=True):
            parts = self._parts(len(batch), self._share)
            yield [
                self._slice(index, samples, len(batch), begin + start, one)
                for (index, start, _, samples), one in zip(parts, loaded, strict=True)
            ]
            begin += len(batch)

    def _fed(self, epoch: int, skip: int) -> Iterator[list[Slice]]:
        """Of each batch that rank 0 reads. **Collective** once a step."""
        feed, own = self._feed, self._share
        batches = CutBatches(self._source, self._batch_size, self._slices, self._seed)
        read = batches.epoch(epoch) if feed.is_first else iter(())
        for _ in itertools.islice(read, skip):
            pass
        begin = skip * self._batch_size
        for step in itertools.count(skip):
            if feed.is_first:
                cut = next(read, None)
                feed.send(functools.partial(self._of_place, cut))
                mine = self._of_place(cut, 0)
            else:
                mine = feed.receive()
            if mine is None:
                return
            total, parts = mine
            # The same numbers on ranks that compute the same slices, whichever of them has read the data.
            rng.seed_all(rng.derive(self._seed, "data", epoch, step, own.start))
            yield [self._slice(index, samples, total, begin + start, batch) for index, start, samples, batch in parts]
            begin += total

    def _of_place(
        self, cut: tuple[int, list[Any]] | None, place: int
    ) -> tuple[int, list[tuple[int, int, int, Any]]] | None:
        """The samples of a batch; index, first position, number of samples and batch of each slice at a place.

        None after the last batch.
        """
        if cut is None:
            return None
        samples, batches = cut
        bounds = [bound for bound in slice_bounds(samples, self._slices) if bound[1] > bound[0]]
        share = ReductionTree.share(self._slices, place, self._places)
        return samples, [
            (index, start, count, batches[bounds.index((start, stop))])
            for index, start, stop, count in self._parts(samples, share)
        ]

    def _slice(self, index: int, samples: int, batch_samples: int, first: int, batch: Any, target: Any = None) -> Slice:
        return Slice(
            index=index, samples=samples, batch=batch, target=target, of=self._slices, batch_samples=batch_samples,
            first=first,
        )  # fmt: skip

    def close(self) -> None:
        """End the loader's worker processes, and free the tensors on the device."""
        self._loader = self._resident = None


def _rows(tensors: Any, rows: torch.Tensor) -> Any:
    # `index_select` takes a third of the time of indexing, but a subclass may index otherwise.
    return map_tensors(tensors, lambda t: t.index_select(0, rows) if type(t) is torch.Tensor else t[rows])


def _keys(batch: Any) -> list[Any]:
    return batch.tolist() if isinstance(batch, torch.Tensor) else list(batch)


def _as_it_is(batch: Any) -> Any:
    return batch


class _Requests:
    """A batch sampler that is given other batches in each epoch, so that the loader and its workers can be reused."""

    batches: Iterator[list[Any]] = iter(())

    def __iter__(self) -> Iterator[list[Any]]:
        return self.batches


def to_device(batch: Any, device: torch.device) -> Any:
    """Move every tensor of a batch; objects with a ``to`` method (token batches, graphs) move themselves."""
    if device.type == "cpu":
        return batch
    return _map_batch(
        batch,
        lambda tensor: tensor.to(device, non_blocking=True),
        lambda value: value.to(device) if callable(getattr(value, "to", None)) else value,
    )


def copy_batch(batch: Any) -> Any:
    """A batch of its own memory: a step may write into its batch, and the user's data, or the next step, needs it."""
    return _map_batch(batch, _cloned, _copied)


def _cloned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _copied(value: Any) -> Any:
    if isinstance(value, nn.Module) or callable(value):
        return value
    try:
        return copy.deepcopy(value)
    except Exception:  # of a class that cannot be copied
        return value


def _map_batch(batch: Any, of_tensor: Callable[[torch.Tensor], Any], of_other: Callable[[Any], Any]) -> Any:
    """Apply functions to the tensors and to the other values in the tuples, lists and dicts of a batch."""
    inner = functools.partial(_map_batch, of_tensor=of_tensor, of_other=of_other)
    if type(batch) is dict:
        return {key: inner(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(inner, batch))
    if type(batch) in (tuple, list):
        return type(batch)(map(inner, batch))
    return of_tensor(batch) if isinstance(batch, torch.Tensor) else of_other(batch)

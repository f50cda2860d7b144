"""The batches of a stream, or ready-made ones, as rank 0 reads them for all ranks: each cut into its slices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import data as torch_data

from nbdist.core.data.one_process import AsOneProcess
from nbdist.core.data.ready_batch import BatchForm
from nbdist.core.data.sampler_runs import set_epoch
from nbdist.core.data.sources import Source
from nbdist.core.data.workers import loading_of, started, with_its_rank
from nbdist.core.process import rng
from nbdist.plan import slice_bounds

__all__ = ["CutBatches"]

_Cut = tuple[int, list[Any]]
"""The samples of a batch, and its slices that are not empty."""


class CutBatches:
    """Reads a stream or ready-made batches. Rank zero only.

    Args:
        source: Its `stream` or `ready` is read.
        batch_size: Global batch size, of a stream.
        slices: Slices per batch, over all ranks.
        seed: The plan's.
    """

    def __init__(self, source: Source, batch_size: int, slices: int, seed: int) -> None:
        self._source, self._batch_size, self._slices, self._seed = source, batch_size, slices, seed

    def epoch(self, epoch: int) -> Iterator[_Cut]:
        """Every batch of an epoch.

        Raises:
            TaskError: A batch cannot be cut.
            Exception: What the user's data raises.
        """
        source = self._source
        rng.seed_all(rng.derive(self._seed, "stream", epoch))
        set_epoch(source.given, epoch)
        with AsOneProcess(), with_its_rank(source.ready):
            elements = started(source.ready if source.ready is not None else self._stream_loader())
        form, step = None, 0
        while True:
            rng.seed_all(rng.derive(self._seed, "data", epoch, step))
            with AsOneProcess():
                try:
                    batch = next(elements)
                except StopIteration:
                    return
            if source.ready is None:
                yield batch
            else:
                form = BatchForm.of(batch) if form is None else form
                yield self._cut(form, batch)
            step += 1

    def _stream_loader(self) -> Any:
        source = self._source
        return torch_data.DataLoader(
            source.stream, batch_size=self._batch_size, drop_last=source.drop_last,
            collate_fn=_CollatedSlices(source.collate, self._slices), **loading_of(source.loading),
        )  # fmt: skip

    def _cut(self, form: BatchForm, batch: Any) -> _Cut:
        samples = form.samples(batch)
        bounds = [(start, stop) for start, stop in slice_bounds(samples, self._slices) if stop > start]
        if self._slices == 1:
            return samples, [batch]
        return samples, [form.take(batch, range(*pair)) for pair in bounds]


class _CollatedSlices:
    """A collate function that collates each slice of a batch of samples."""

    def __init__(self, collate: Callable[[list[Any]], Any], slices: int) -> None:
        self._collate, self._slices = collate, slices

    def __call__(self, samples: list[Any]) -> _Cut:
        bounds = [(start, stop) for start, stop in slice_bounds(len(samples), self._slices) if stop > start]
        return len(samples), [self._collate(samples[start:stop]) for start, stop in bounds]

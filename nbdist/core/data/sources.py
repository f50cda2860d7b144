"""Training data in the forms a user may give (Dataset, DataLoader, tensors, arrays, batches), as one: `Source`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils import data as torch_data

from nbdist.core.data.forms import form_of, loader_form
from nbdist.core.data.one_process import AsOneProcess
from nbdist.core.data.ready_batch import BatchForm
from nbdist.core.data.untouched import untouched
from nbdist.core.process import rng
from nbdist.errors import PlanError, TaskError

__all__ = ["Source", "map_tensors", "tensors_in"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data in one of four forms, exactly one of which is set.

    Args:
        tensors: In memory: a tensor, or a tuple or dict of tensors that share their first dimension.
        indices: Rows of `tensors` that belong to the data, ``(samples,)``; None for all.
        dataset: Map-style: anything with a length and items.
        stream: Iterable-style: yields samples. Rank 0 reads it for all.
        ready: An iterable of ready-made batches. Rank 0 reads it for all.
        collate: Turns a list of samples into a batch.
        loading: The user's DataLoader settings that are kept: ``num_workers`` and the like.
        batch_size: The DataLoader's batch size, taken as the global one; None without a DataLoader.
        shuffle: Whether the DataLoader shuffles; None without one.
        drop_last: Whether a last, smaller batch is dropped.
        sampler: Decides the order of samples, in place of the plan. Rank 0 runs it for all.
        batch_sampler: Decides the samples of each global batch, in place of the plan. Rank 0 runs it for all.
        head: What rank 0 has read of what it reads for all, for a check: samples, a batch, or keys of samples.
    """

    tensors: Any = None
    indices: torch.Tensor | None = None
    dataset: Any = None
    stream: Any = None
    ready: Any = None
    collate: Callable[[list[Any]], Any] = torch_data.default_collate
    loading: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    shuffle: bool | None = None
    drop_last: bool = False
    sampler: Any = None
    batch_sampler: Any = None
    head: Any = None

    @classmethod
    def of(cls, data: Any, name: str = "data", *, batch_size: int | None = None) -> Source:
        """Convert `data`, which the user calls `name`.

        Args:
            data: The data.
            name: For errors.
            batch_size: That the user gave, if any.

        Raises:
            TaskError: It has none of the forms, is empty, or uses a sampler that takes a rank's part itself.
        """
        is_loader = isinstance(data, torch_data.DataLoader)
        source = cls(**(loader_form(data, name) if is_loader else form_of(data, name, batch_size)))
        if source.samples == 0:
            raise TaskError(f"{name} is empty: there is no sample to train on.")
        return source

    def check_agrees(self, name: str, option: str, given: Any) -> None:
        """Raise `PlanError` if an option contradicts the DataLoader, which the user calls `name`. Local."""
        own = getattr(self, option)
        if given is not None and own is not None and given != own:
            raise PlanError(
                f"{option}={given} contradicts the DataLoader {name}, which has {own}: omit one of the two."
            )

    @property
    def given(self) -> Any:
        """The tensors, dataset, stream or batches."""
        return next(form for form in (self.tensors, self.dataset, self.stream, self.ready) if form is not None)

    @property
    def is_fed(self) -> bool:
        """Whether rank 0 alone reads it, or runs its sampler."""
        return any(one is not None for one in (self.stream, self.ready, self.sampler, self.batch_sampler))

    @property
    def sets_batches(self) -> bool:
        """Whether the data, not the plan, decides how many samples a batch has."""
        return self.ready is not None or self.batch_sampler is not None

    @property
    def samples(self) -> int | None:
        """Samples per epoch; None if that is not known."""
        if self.sampler is not None:
            return _len(self.sampler)
        if self.sets_batches:
            return None
        if self.indices is not None:
            return len(self.indices)
        if self.tensors is not None:
            return len(next(tensors_in(self.tensors)))
        return len(self.dataset) if self.dataset is not None else _len(self.stream)

    @property
    def batches_given(self) -> int | None:
        """Batches per epoch, where the data decides it and has a length; else None."""
        return _len(self.batch_sampler if self.batch_sampler is not None else self.ready)

    def steps(self, batch_size: int) -> int | None:
        """Batches per epoch, of a size if the data does not decide it; None if the data has no length."""
        if self.sets_batches:
            return self.batches_given
        samples = self.samples
        if samples is None:
            return None
        return samples // batch_size if self.drop_last else -(-samples // batch_size)

    def first(self, samples: int = 1, *, consume: bool = False) -> Any:
        """The first samples as a batch; None if that would consume a stream, unless `consume` allows it.

        They are read from a copy, so that nothing is opened in the user's own object.
        """
        if self.head is not None:
            return self.of_head(range(min(samples, self.head_samples)))
        if self.tensors is not None:
            row = slice(0, samples) if self.indices is None else self.indices[:samples]
            return map_tensors(self.tensors, lambda tensor: tensor[row])
        if self.dataset is None and not consume:
            return None
        with rng.fork_rng(torch.device("cpu")), untouched(self) as copied:  # a data set may draw random numbers
            if self.dataset is None or (self.is_fed and consume):
                head = copied.read_head(samples)
                chosen = Source(**{**vars(self), "dataset": copied.dataset, "head": head})
                return chosen.of_head(range(min(samples, chosen.head_samples)))
            try:
                return self.collate([copied.dataset[i] for i in range(min(samples, len(self.dataset)))])
            except Exception:
                if self.is_fed:  # a sampler may know other keys than numbers, and batches of samples that fit together
                    return None
                raise

    def read_head(self, samples: int) -> Any:
        """The first samples of a stream, the first batch, or the first keys of a sampler; None without any. Local."""
        given = next(one for one in (self.ready, self.stream, self.batch_sampler, self.sampler) if one is not None)
        with AsOneProcess():
            elements = iter(given)
            if self.sets_batches:
                first = next(elements, None)
                return first if self.ready is not None or first is None else list(first)
            return list(itertools.islice(elements, samples)) or None

    @property
    def head_samples(self) -> int:
        """How many samples `head` has."""
        return BatchForm.of(self.head).samples(self.head) if self.ready is not None else len(self.head)

    def of_head(self, rows: Sequence[int]) -> Any:
        """A batch of some samples of `head`. Local."""
        if self.ready is not None:
            form = BatchForm.of(self.head)
            return self.head if len(rows) == form.samples(self.head) else form.take(self.head, rows)
        if self.stream is not None:
            return self.collate([self.head[i] for i in rows])
        return self.rows_of([self.head[i] for i in rows])

    def rows_of(self, keys: Sequence[Any]) -> Any:
        """A batch of the samples with these keys. Local."""
        if self.tensors is None:
            return self.collate([self.dataset[key] for key in keys])
        rows = torch.tensor(keys) if self.indices is None else self.indices[torch.tensor(keys)]
        return map_tensors(self.tensors, functools.partial(_taken, rows=rows))

    def batches(self, rows: Sequence[Sequence[int]]) -> list[Any] | None:
        """A batch of the samples in each sequence of rows, each sample read once; None if they cannot be read twice.

        Rows are counted from the start of the data, or of `head`.
        """
        with rng.fork_rng(torch.device("cpu")):
            if self.tensors is not None and self.head is None:
                return [self.rows_of(one) for one in rows]
            if self.head is not None and self.dataset is None:
                return [self.of_head(one) for one in rows]
            if self.dataset is None:
                return None
            keys = range(1 + max(max(one) for one in rows)) if self.head is None else self.head
            samples = [self.dataset[key] for key in keys]
            return [self.collate([samples[i] for i in one]) for one in rows]


def _len(given: Any) -> int | None:
    try:
        return len(given)
    except Exception:  # its class may say in any way that it does not know
        return None


def _taken(tensor: Any, rows: torch.Tensor) -> Any:
    return tensor[rows]


def tensors_in(batch: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a nest of tuples, lists and dicts, depth first."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from tensors_in(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from tensors_in(value)


def map_tensors(nest: Any, change: Callable[[Any], torch.Tensor]) -> Any:
    """Apply `change` to a tensor, or to every one in a tuple or dict of tensors."""
    if isinstance(nest, dict):
        return {key: change(value) for key, value in nest.items()}
    return tuple(map(change, nest)) if isinstance(nest, tuple) else change(nest)

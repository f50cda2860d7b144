"""Training data in the forms a user may give (Dataset, DataLoader, tensors, arrays), brought to one form: `Source`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils import data as torch_data

from nbdist.core.process import rng
from nbdist.errors import TaskError

__all__ = ["Source", "map_tensors", "tensors_in"]

_FORMS = "give a Dataset, a DataLoader, or a tuple of tensors or NumPy arrays"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Data in one of three forms, exactly one of which is set.

    Args:
        tensors: In memory: a tensor, or a tuple or dict of tensors that share their first dimension.
        indices: Rows of `tensors` that belong to the data, ``(samples,)``; None for all.
        dataset: Map-style: anything with a length and items.
        stream: Iterable-style: yields the same elements, in the same order, on every rank.
        collate: Turns a list of samples into a batch.
        loading: The user's DataLoader settings that are kept: ``num_workers`` and the like.
        batch_size: The DataLoader's batch size, taken as the global one; None without a DataLoader.
        shuffle: Whether the DataLoader shuffles; None without one.
        drop_last: Whether a last, smaller batch is dropped.
        sampler: A sampler that decides the sample order, in place of the plan.
    """

    tensors: Any = None
    indices: torch.Tensor | None = None
    dataset: Any = None
    stream: Any = None
    collate: Callable[[list[Any]], Any] = torch_data.default_collate
    loading: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    shuffle: bool | None = None
    drop_last: bool = False
    sampler: Any = None

    @classmethod
    def of(cls, data: Any, name: str = "data") -> Source:
        """Convert `data`, which the user calls `name`.

        Raises:
            TaskError: It has none of the forms, is empty, or uses a sampler that cannot be distributed.
        """
        source = cls._of_loader(data, name) if isinstance(data, torch_data.DataLoader) else cls(**_form(data, name))
        if source.samples == 0:
            raise TaskError(f"{name} is empty: there is no sample to train on.")
        return source

    @property
    def given(self) -> Any:
        """The tensors, dataset or stream."""
        return next(form for form in (self.tensors, self.dataset, self.stream) if form is not None)

    @classmethod
    def _of_loader(cls, loader: torch_data.DataLoader[Any], name: str) -> Source:
        if loader.batch_size is None:
            what = type(loader.batch_sampler).__name__ if loader.batch_sampler is not None else "batch_size=None"
            raise TaskError(
                f"{name} is a DataLoader with {what}, whose batches cannot be distributed over ranks: "
                "give it a batch_size (the global one), or pass its dataset."
            )
        form = _form(loader.dataset, f"{name}.dataset")
        loading = {
            key: getattr(loader, key)
            for key in ("num_workers", "worker_init_fn", "timeout", "prefetch_factor", "multiprocessing_context")
        }
        if form.get("tensors") is not None and loader.collate_fn is not torch_data.default_collate:
            form = {"dataset": loader.dataset}
        shuffle, sampler = (None, None) if "stream" in form else _order(loader.sampler, name)
        return cls(
            **form, collate=loader.collate_fn, loading=loading, batch_size=loader.batch_size, shuffle=shuffle,
            drop_last=loader.drop_last, sampler=sampler,
        )  # fmt: skip

    @property
    def samples(self) -> int | None:
        """Samples per epoch; None if the data has no length."""
        if self.sampler is not None:
            return len(self.sampler)
        if self.indices is not None:
            return len(self.indices)
        if self.tensors is not None:
            return len(next(tensors_in(self.tensors)))
        if self.dataset is not None:
            return len(self.dataset)
        try:
            return len(self.stream)
        except (TypeError, NotImplementedError):
            return None

    def first(self, samples: int = 1, *, consume: bool = False) -> Any:
        """The first samples as a batch; None if that would consume a stream, unless `consume` allows it."""
        if self.tensors is not None:
            row = slice(0, samples) if self.indices is None else self.indices[:samples]
            return map_tensors(self.tensors, lambda tensor: tensor[row])
        with rng.fork_rng(torch.device("cpu")):  # a data set may draw random numbers
            if self.dataset is not None:
                return self.collate([self.dataset[i] for i in range(min(samples, len(self.dataset)))])
            return self.collate(list(itertools.islice(self.stream, samples))) if consume else None

    def batches(self, rows: Sequence[Sequence[int]]) -> list[Any] | None:
        """A batch of the samples in each sequence of rows, each sample read once; None if that ends a stream.

        Rows of a stream are counted from its start.
        """
        if self.tensors is not None:
            indices = self.indices
            chosen = [torch.tensor(one) if indices is None else indices[torch.tensor(one)] for one in rows]
            return [map_tensors(self.tensors, functools.partial(_taken, rows=one)) for one in chosen]
        stop = 1 + max(max(one) for one in rows)
        with rng.fork_rng(torch.device("cpu")):
            if self.dataset is not None:
                samples = [self.dataset[i] for i in range(stop)]
            else:
                elements = iter(self.stream)
                if elements is self.stream:
                    return None
                samples = list(itertools.islice(elements, stop))
            return [self.collate([samples[i] for i in one]) for one in rows]


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


def _form(data: Any, name: str) -> dict[str, Any]:
    if isinstance(data, torch_data.IterableDataset):
        return {"stream": data}
    if type(data) is torch_data.TensorDataset:
        return {"tensors": tuple(map(_tensor, data.tensors))}
    if type(data) is torch_data.Subset:
        inner = _form(data.dataset, f"{name}.dataset")
        if inner.get("tensors") is None:
            return {"dataset": data}
        chosen = torch.as_tensor(data.indices, dtype=torch.long)
        return {**inner, "indices": chosen if inner.get("indices") is None else inner["indices"][chosen]}
    if isinstance(data, (tuple, dict, torch.Tensor, np.ndarray)):
        return {"tensors": _in_memory(data, name)}
    if not isinstance(data, str) and isinstance(data, Sized) and hasattr(data, "__getitem__"):
        return {"dataset": data}
    raise TaskError(f"{name} is {_article(data)}, not data: {_FORMS}.")


def _in_memory(data: Any, name: str) -> Any:
    parts = list(data.values()) if isinstance(data, dict) else list(data) if isinstance(data, tuple) else [data]
    if not parts:
        raise TaskError(f"{name} is empty: {_FORMS}.")
    for part in parts:
        if not isinstance(part, (torch.Tensor, np.ndarray)):
            raise TaskError(f"{name} holds {_article(part)}: {_FORMS}.")
        if part.ndim == 0:
            raise TaskError(f"{name} holds a scalar, which has no samples: {_FORMS}.")
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        raise TaskError(f"the tensors of {name} differ in their number of samples, {lengths}: make them equal.")
    return map_tensors(data, _tensor)


def _tensor(part: Any) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        return part.detach().cpu()  # to be sent to every rank
    # torch shares memory with writable arrays of positive strides only; others are copied.
    usable = part.flags.writeable and all(stride >= 0 for stride in part.strides)
    return torch.from_numpy(part if usable else part.copy())


def _order(sampler: Any, name: str) -> tuple[bool | None, Any]:
    """Whether the loader shuffles, and the sampler that decides the sample order in place of the plan, if any."""
    if type(sampler) is torch_data.SequentialSampler:
        return False, None
    if type(sampler) is torch_data.RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        return (True, None) if whole else (None, sampler)
    if isinstance(sampler, torch_data.DistributedSampler):
        raise TaskError(f"{name} uses a DistributedSampler, but nbdist distributes the samples itself: omit it.")
    if not isinstance(sampler, Sized):
        raise TaskError(f"{name} uses {type(sampler).__name__}, a sampler without a length: give it a __len__.")
    return None, sampler


def _article(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"

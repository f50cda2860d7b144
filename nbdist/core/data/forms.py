"""Which form of a `Source` some data has: each kind that a user may give, and what is refused, by name."""

from __future__ import annotations

import io
import types
from collections.abc import Iterable, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils import data as torch_data

from nbdist.core.data.ready_batch import looks_like_batch
from nbdist.errors import TaskError

__all__ = ["form_of", "is_flat", "loader_form"]

_FORMS = "give a Dataset, a DataLoader, or a tuple of tensors or NumPy arrays"
_OWN_READING = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation")
_LOADING = ("num_workers", "worker_init_fn", "timeout", "prefetch_factor", "multiprocessing_context")
_COLUMNS = (torch.Tensor, np.ndarray, str, bytes, list, tuple, dict)
_FEW = 4
"""A list of so few tensors is not a data set of so few samples."""


def form_of(data: Any, name: str, batch_size: int | None) -> dict[str, Any]:
    """The arguments of a `Source` for data that is no DataLoader. Local.

    Raises:
        TaskError: It has no form, or may have two.
    """
    if isinstance(data, torch_data.IterableDataset):
        return {"ready": data} if _passes_batches_on(data) else {"stream": data}
    if type(data) is torch_data.TensorDataset:
        return {"tensors": tuple(map(_tensor, data.tensors))}
    if type(data) is torch_data.Subset:
        inner = form_of(data.dataset, f"{name}.dataset", batch_size)
        if inner.get("tensors") is None:
            return {"dataset": data}
        chosen = torch.as_tensor(data.indices, dtype=torch.long)
        return {**inner, "indices": chosen if inner.get("indices") is None else inner["indices"][chosen]}
    if hasattr(data, "columns") and hasattr(data, "to_numpy"):
        raise TaskError(
            f"{name} is a {type(data).__name__}, whose columns are neither inputs nor targets yet: give arrays, as in "
            f"({name}[inputs].to_numpy(dtype='float32'), {name}[target].to_numpy())."
        )
    if isinstance(data, (tuple, dict, torch.Tensor, np.ndarray)):
        return {"tensors": _in_memory(data, name)}
    if isinstance(data, list):
        _check_list(data, name, batch_size)
    if not isinstance(data, (str, bytes)) and isinstance(data, Sized) and hasattr(data, "__getitem__"):
        return {"dataset": data}
    if _is_consumed(data):
        raise TaskError(
            f"{name} is a {type(data).__name__}, which can be read only once: give a list, or an object whose __iter__ "
            "begins anew."
        )
    if isinstance(data, (set, frozenset, Mapping, io.IOBase)) or not isinstance(data, Iterable) or _is_text(data):
        raise TaskError(f"{name} is {_article(data)}, not data: {_FORMS}.")
    return {"ready": data}


def loader_form(loader: torch_data.DataLoader[Any], name: str) -> dict[str, Any]:
    """The arguments of a `Source` for a DataLoader: what it reads, and how. Local.

    Raises:
        TaskError: Its sampler takes a rank's part itself.
    """
    _check_whole(loader, name)
    if _reads_its_own_way(loader) or (loader.batch_size is None and loader.batch_sampler is None):
        return {"ready": loader}
    loading = {key: getattr(loader, key) for key in _LOADING}
    if loader.batch_size is None:
        return {
            "dataset": loader.dataset, "batch_sampler": loader.batch_sampler, "collate": loader.collate_fn,
            "loading": loading,
        }  # fmt: skip
    form = form_of(loader.dataset, f"{name}.dataset", loader.batch_size)
    if form.get("tensors") is not None and loader.collate_fn is not torch_data.default_collate:
        form = {"dataset": loader.dataset}
    shuffle, sampler = (None, None) if form.keys() & {"stream", "ready"} else _order(loader.sampler)
    if "ready" in form and isinstance(loader.dataset, torch_data.IterableDataset):
        form = {"stream": loader.dataset}  # whoever gives it a batch size means samples
    return {
        **form, "collate": loader.collate_fn, "loading": loading, "batch_size": loader.batch_size, "shuffle": shuffle,
        "drop_last": loader.drop_last, "sampler": sampler,
    }  # fmt: skip


def _reads_its_own_way(loader: torch_data.DataLoader[Any]) -> bool:
    """Whether a subclass decides what iterating gives."""
    kind = type(loader)
    own = any(getattr(kind, name) is not getattr(torch_data.DataLoader, name) for name in _OWN_READING)
    return own or "__iter__" in vars(loader)


def _check_whole(loader: torch_data.DataLoader[Any], name: str) -> None:
    """Refuse a sampler that takes one rank's part of the samples."""
    samplers = (loader.batch_sampler, loader.sampler)
    for sampler in (*samplers, *(getattr(one, "sampler", None) for one in samplers)):
        if isinstance(sampler, torch_data.DistributedSampler):
            raise TaskError(f"{name} uses a DistributedSampler, but nbdist distributes the samples itself: omit it.")
        replicas = getattr(sampler, "num_replicas", None)
        if isinstance(replicas, int) and replicas > 1:
            raise TaskError(
                f"{name} uses a {type(sampler).__name__} for one of {replicas} replicas, but nbdist distributes the "
                "samples itself: give num_replicas=1 and rank=0."
            )


def _order(sampler: Any) -> tuple[bool | None, Any]:
    """Whether the loader shuffles, and the sampler that decides the sample order in place of the plan, if any."""
    if type(sampler) is torch_data.SequentialSampler:
        return False, None
    if type(sampler) is torch_data.RandomSampler:
        whole = not sampler.replacement and sampler.num_samples == len(sampler.data_source)
        return (True, None) if whole else (None, sampler)
    return None, sampler


def _passes_batches_on(stream: Any) -> bool:
    """Whether a stream is a pipeline behind a DataLoader, whose batches it gives."""
    held = [*vars(stream).values()]
    held += [item for value in held if isinstance(value, (list, tuple)) for item in value[:100]]
    return any(isinstance(value, torch_data.DataLoader) for value in held)


def _is_consumed(data: Any) -> bool:
    """Whether data is an iterator of Python's own."""
    return hasattr(type(data), "__next__") and (
        isinstance(data, types.GeneratorType) or type(data).__module__ in ("builtins", "itertools")
    )


def _is_text(data: Any) -> bool:
    return isinstance(data, (str, bytes, bytearray, memoryview, type({}.keys()), type({}.values()), type({}.items())))


def _check_list(data: list[Any], name: str, batch_size: int | None) -> None:
    """Refuse a list that is no list of samples, or may be none."""
    if not data:
        return
    arrays = [item for item in data if isinstance(item, (torch.Tensor, np.ndarray)) and item.ndim]
    if len(arrays) == len(data) <= _FEW and len({len(item) for item in arrays}) == 1 and len(arrays[0]) > len(data):
        raise TaskError(
            f"{name} is a list of {len(data)} tensors of {len(arrays[0])} rows each: give a tuple if they are inputs "
            "and targets, or torch.stack(...) of them if they are samples."
        )
    if batch_size is None and not arrays and all(looks_like_batch(item) for item in data[:2]):
        raise TaskError(
            f"{name} is a list of {len(data)} items, which may be batches as well as samples (the tensors of each "
            f"share their first dimension): give batch_size (--batch-size N) if they are samples, or "
            f"DataLoader({name}, batch_size=None) if they are batches."
        )


def _in_memory(data: Any, name: str) -> Any:
    parts = list(data.values()) if isinstance(data, dict) else list(data) if isinstance(data, tuple) else [data]
    if not parts:
        raise TaskError(f"{name} is empty: {_FORMS}.")
    if isinstance(data, dict) and not all(isinstance(key, str) for key in data):
        raise TaskError(
            f"{name} is a dict by {_article(next(iter(data)))}: a dict is taken for columns by name, so give "
            f"list({name}.values()) if its values are samples."
        )
    if isinstance(data, dict):
        for key, part in data.items():
            if isinstance(part, Sized) and hasattr(part, "__getitem__") and not isinstance(part, _COLUMNS):
                raise TaskError(
                    f"{name}[{key!r}] is {_article(part)}, not a column of tensors or NumPy arrays: give "
                    f"{name}[{key!r}] if it is a data set."
                )
    for part in parts:
        if not isinstance(part, (torch.Tensor, np.ndarray)):
            raise TaskError(f"{name} holds {_article(part)}: {_FORMS}.")
        if part.ndim == 0:
            raise TaskError(f"{name} holds a scalar, which has no samples: {_FORMS}.")
        if isinstance(part, np.ndarray) and part.dtype.kind in "OUSV":
            raise TaskError(f"{name} holds an array of {part.dtype}, which no tensor can be: give numbers.")
    lengths = [len(part) for part in parts]
    if len(set(lengths)) > 1:
        raise TaskError(f"the tensors of {name} differ in their number of samples, {lengths}: make them equal.")
    if isinstance(data, dict):
        return {key: _tensor(part) for key, part in data.items()}
    return tuple(map(_tensor, data)) if isinstance(data, tuple) else _tensor(data)


def _tensor(part: Any) -> torch.Tensor:
    if isinstance(part, torch.Tensor):
        return part.detach().cpu()  # to be sent to every rank
    # torch shares memory with writable arrays of positive strides only; others are copied.
    usable = part.flags.writeable and all(stride >= 0 for stride in part.strides)
    return torch.from_numpy(part if usable else part.copy())


def _article(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"


def is_flat(first: Any) -> bool:
    """Whether the first of a batch's values is a row of numbers for each sample. Local."""
    value = first[0] if isinstance(first, (tuple, list)) and len(first) else first
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim == 2

"""Ready-made batches: how one is cut along its samples, seen in the first and used for all."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import PackedSequence

from nbdist.errors import TaskError

__all__ = ["BatchForm", "FieldForm", "looks_like_batch"]

_ATOMS = (str, bytes, int, float, complex, bool, type(None), np.generic)
_MOST_WAYS = 16
_FEW = 4
"""A list of more tensors of one kind may as well be one of samples."""
_CURE = (
    "give batches whose tensors and lists have the samples in their first dimension, give the data set with a "
    "collate_fn instead (nbdist then collates each slice), or use one rank"
)


@dataclasses.dataclass(frozen=True)
class FieldForm:
    """How a value in a batch is cut: by "rows" (tensors, lists of samples), by "fields", or "whole" with each slice.

    Args:
        how: One of the three.
        path: Where the value is, as the user would write it.
        fields: By key or place.
    """

    how: str
    path: str
    fields: tuple[tuple[Any, FieldForm], ...] = ()

    def rows(self, value: Any) -> Iterator[tuple[str, int]]:
        """The paths of all that is cut by rows in a batch of this form, and the number of rows. Local.

        Raises:
            TaskError: A batch is of another form.
        """
        if self.how == "rows":
            length = _length(value)
            if length is None:
                raise TaskError(f"{self.path} is {_kind(value)} in one batch and has samples in another: {_CURE}.")
            yield self.path, length
        for key, form in self.fields:
            try:
                field = _get(value, key)
            except (KeyError, IndexError, AttributeError, TypeError):
                raise TaskError(
                    f"{form.path} is in the first batch of an epoch, but not in a later one: all need the same form."
                ) from None
            yield from form.rows(field)

    def take(self, value: Any, rows: Sequence[int]) -> Any:
        """The part of a value with some of its samples; tensors are views where the rows follow each other."""
        if self.how == "whole":
            return value
        if self.how == "rows":
            return _taken(value, rows)
        return _rebuilt(value, {key: form.take(_get(value, key), rows) for key, form in self.fields})


@dataclasses.dataclass(frozen=True)
class BatchForm:
    """How batches are cut along their samples.

    Args:
        root: Of the whole batch; None if it cannot be cut.
        why_not: Why it cannot be cut, as a clause.
    """

    root: FieldForm | None
    why_not: str = ""

    @classmethod
    def of(cls, batch: Any) -> BatchForm:
        """The form of a batch, and of all others like it. Local."""
        try:
            ways = _ways(batch, "batch", top=True)
        except _CannotBeCutError as why:
            return cls(None, str(why))
        found = [(count, form) for count, forms in ways.items() if count is not None for form in forms]
        if len(found) == 1:
            return cls(found[0][1])
        if not found:
            return cls(None, _mismatch(batch))
        counts = sorted({count for count, _ in found})
        numbers = " or ".join(map(str, counts))
        return cls(
            None,
            f"it may be read as {numbers} samples in more than one way: give tensors instead of lists, or a dict "
            "instead of a list of parts",
        )

    def samples(self, batch: Any) -> int:
        """How many samples a batch has; 1 for one that cannot be cut. Local.

        Raises:
            TaskError: Its parts do not agree on it.
        """
        if self.root is None:
            return 1
        counts = list(self.root.rows(batch))
        first_path, first = counts[0]
        for path, count in counts:
            if count != first:
                raise TaskError(f"{first_path} has {first} samples, and {path} has {count}: {_CURE}.")
        return first

    def take(self, batch: Any, rows: Sequence[int]) -> Any:
        """A batch of some of the samples. Local.

        Raises:
            TaskError: The batch cannot be cut.
        """
        if self.root is None:
            raise TaskError(
                f"a ready-made batch ({_kind(batch)}) cannot be cut into slices, since {self.why_not}: {_CURE}."
            )
        return self.root.take(batch, rows)


def looks_like_batch(value: Any) -> bool:
    """Whether a value may be a batch as well as a sample: tensors share a first dimension, one has another. Local."""
    tensors = list(_tensors(value))
    if len(tensors) < 1 or any(t.ndim == 0 for t in tensors):
        return False
    return len({len(t) for t in tensors}) == 1 and len(tensors[0]) > 1 and any(t.ndim > 1 for t in tensors)


class _CannotBeCutError(Exception):
    """Something in a batch cannot be cut; the text is a clause that says why."""


_Ways = dict[int | None, list[FieldForm]]
"""The forms that a value may have, by its number of samples; None for what is the same in each slice."""


def _ways(value: Any, path: str, *, top: bool = False) -> _Ways:
    if isinstance(value, _ATOMS):
        return {None: [FieldForm("whole", path)]}
    if isinstance(value, PackedSequence):
        raise _CannotBeCutError(f"{path} is a PackedSequence, whose samples lie across each other")
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided or value.is_nested:
            raise _CannotBeCutError(f"{path} is a tensor of layout {value.layout}")
        return {len(value) if value.ndim else None: [FieldForm("rows" if value.ndim else "whole", path)]}
    if isinstance(value, np.ndarray):
        return {len(value) if value.ndim else None: [FieldForm("rows" if value.ndim else "whole", path)]}
    fields = _fields(value)
    if fields is None:
        length = _length(value)
        if length is None:
            raise _CannotBeCutError(f"{path} is {_kind(value)}")
        return {length: [FieldForm("rows", path)]}
    if not _is_plain_sequence(value):
        return _of_fields(value, fields, path)
    if not fields:
        return {0: [FieldForm("rows", path)]}
    as_samples = FieldForm("rows", path)
    if all(isinstance(item, _ATOMS) for item in value):
        return {len(value): [as_samples]}
    try:
        ways = _of_fields(value, fields, path)
    except _CannotBeCutError:
        if top and not _alike(value):
            raise
        return {len(value): [as_samples]}
    as_fields = [form for count, forms in ways.items() if count is not None for form in forms]
    if top and as_fields and not _may_be_samples(value):
        return ways
    if top and not _alike(value):
        return ways
    together = {count: list(forms) for count, forms in ways.items()}
    together.setdefault(len(value), []).append(as_samples)
    return together


def _of_fields(value: Any, fields: list[tuple[Any, Any]], path: str) -> _Ways:
    """The forms of a value whose fields are parts of a batch, all with the same number of samples."""
    each = [(key, _ways(field, _path(value, path, key))) for key, field in fields]
    if all(set(ways) == {None} for _, ways in each):
        return {None: [FieldForm("whole", path)]}
    counts = {count for _, ways in each for count in ways if count is not None}
    found: _Ways = {}
    for count in counts:
        choices = [ways.get(count, []) + ways.get(None, []) for _, ways in each]
        if not all(choices):
            continue
        combined = itertools.islice(itertools.product(*choices), _MOST_WAYS)
        found[count] = [
            FieldForm("fields", path, tuple((key, form) for (key, _), form in zip(each, forms, strict=True)))
            for forms in combined
        ]
    return found


def _alike(items: Sequence[Any]) -> bool:
    """Whether all items of a list may be samples: of one kind."""
    first = items[0]
    if isinstance(first, Mapping):
        return all(isinstance(item, Mapping) and item.keys() == first.keys() for item in items)
    if isinstance(first, (torch.Tensor, np.ndarray)):
        kinds = {(type(item), getattr(item, "ndim", None), getattr(item, "dtype", None)) for item in items}
        return len(kinds) == 1 and len(items) > _FEW
    if isinstance(first, (tuple, list)):
        return len(items) > _FEW and {(type(item), len(item)) for item in items} == {(type(first), len(first))}
    return all(type(item) is type(first) for item in items)


def _may_be_samples(items: Sequence[Any]) -> bool:
    """Whether a list that can be read as fields may as well be one of samples."""
    return len(items) > 1 and _alike(items)


def _is_plain_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(type(value), "_fields")


def _fields(value: Any) -> list[tuple[Any, Any]] | None:
    """The parts of a structure by key or place; None for anything else."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value) if field.init]
    return None


def _get(value: Any, key: Any) -> Any:
    if isinstance(value, (Mapping, list, tuple)):
        return value[key]
    return getattr(value, key)


def _path(value: Any, path: str, key: Any) -> str:
    if hasattr(type(value), "_fields"):
        return f"{path}.{value._fields[key]}"
    return f"{path}[{key!r}]" if isinstance(value, (Mapping, list, tuple)) else f"{path}.{key}"


def _length(value: Any) -> int | None:
    """The number of rows of what can be cut by slicing; None for all else."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return len(value) if value.ndim else None
    if isinstance(value, (list, tuple)):
        return len(value)
    if isinstance(value, (*_ATOMS, Mapping)) or not hasattr(type(value), "__getitem__"):
        return None
    try:
        length, part = len(value), value[0:1]
        fits = type(part) is type(value) and len(part) == min(1, length)
    except Exception:  # of a class of anybody's: it has no rows
        return None
    return length if fits else None


def _taken(value: Any, rows: Sequence[int]) -> Any:
    start, stop = (rows[0], rows[-1] + 1) if len(rows) else (0, 0)
    if list(rows) == list(range(start, stop)):
        return value[start:stop]
    if isinstance(value, (list, tuple)):
        return type(value)(value[i] for i in rows)
    return value[list(rows)]


def _rebuilt(value: Any, fields: dict[Any, Any]) -> Any:
    """A structure of the same type with other fields."""
    kind: Any = type(value)
    if hasattr(type(value), "_fields"):
        return kind(*fields.values())
    if isinstance(value, (list, tuple)):
        return kind(fields.values())
    if kind is dict:
        return fields
    if isinstance(value, Mapping):
        try:
            made = kind(fields)
            if made.keys() == fields.keys():
                return made
        except Exception:  # its class takes other arguments
            made = None
        mutable: Any = copy.copy(value)
        mutable.update(fields)
        return mutable
    return dataclasses.replace(value, **fields)


def _tensors(value: Any) -> Iterator[Any]:
    """Tensors and arrays of a nest; a scalar tensor for anything else than a container."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif not isinstance(value, (str, bytes)):
        yield np.zeros(())


def _mismatch(batch: Any) -> str:
    shapes = [f"{tuple(tensor.shape)}" for tensor in itertools.islice(_tensors(batch), 6) if tensor.ndim]
    if not shapes:
        return f"it holds no tensor or list with samples ({_kind(batch)})"
    return f"its parts do not share a first dimension (their shapes are {', '.join(shapes)})"


def _kind(value: Any) -> str:
    return "None" if value is None else f"a value of type {type(value).__name__}"

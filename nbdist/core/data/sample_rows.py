"""Values with a row for each sample (outputs, targets) taken apart, sent as plain data and tensors, and put together.

A value is a nest of tuples, dicts and whatever pytree knows, with leaves: a tensor or array, whose first dimension is
that of samples; a list with an entry for each sample, as of strings or boxes; or plain data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from nbdist.errors import TaskError
from nbdist.upstream.torch_private import pytree

__all__ = [
    "Rows",
    "SentRows",
    "from_note",
    "has_rows",
    "join",
    "kept",
    "nbytes",
    "pack_rows",
    "rows_from_note",
    "rows_to_note",
    "to_note",
    "unpack_rows",
    "without_rowless",
]

_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Rows:
    """What one slice gave.

    Args:
        places: The places of its samples in the epoch.
        values: Nests, such as output and target, on the CPU or the device.
    """

    places: range
    values: tuple[Any, ...]


SentRows = tuple[Any, list[torch.Tensor | None]]
"""Rows as a note of plain data and tensors, as a `Link` sends them."""


def kept(value: Any, device: torch.device | None = None) -> Any:
    """A copy of a nest without graph, on a device or where it is; later changes to the original do not matter."""

    def copied(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return leaf.detach().to(device or leaf.device, copy=True)
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    return pytree.tree_map(copied, value)


def nbytes(value: Any) -> int:
    """The bytes of the tensors and arrays in a nest."""
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(value) if isinstance(leaf, (torch.Tensor, np.ndarray)))


def pack_rows(rows: Rows, what: str) -> SentRows:
    """Rows to be sent to a rank that has rows of the same structure.

    Raises:
        TaskError: They hold what cannot be sent.
    """
    tensors: list[torch.Tensor | None] = []
    notes = []
    for value in rows.values:
        leaves, spec = _taken_apart(value)
        notes.append([str(spec), [_packed(leaf, tensors, what) for leaf in leaves]])
    places = rows.places
    return [[places.start, places.stop, places.step], notes], tensors


def unpack_rows(note: Any, tensors: list[torch.Tensor | None], like: Rows, what: str) -> Rows:
    """The inverse of `pack_rows`.

    Args:
        note: The note.
        tensors: The tensors.
        like: Rows of this rank, whose classes are those of the result.
        what: What they are, for errors.

    Raises:
        TaskError: Their structure is not that of `like`.
    """
    (start, stop, step), notes = note
    values = []
    for (text, leaves), own in zip(notes, like.values, strict=True):
        _, spec = _taken_apart(own)
        if str(spec) != text:
            raise _differ(what, str(spec), text)
        values.append(pytree.tree_unflatten([_unpacked(leaf, tensors) for leaf in leaves], spec))
    return Rows(range(start, stop, step), tuple(values))


def to_note(value: Any, what: str) -> tuple[Any, list[torch.Tensor]]:
    """A nest as plain data and tensors, for a rank that has none like it.

    Raises:
        TaskError: It holds what cannot be sent.
    """
    tensors: list[torch.Tensor] = []
    leaves, spec = pytree.tree_flatten(value)
    return [pytree.treespec_dumps(spec), [_packed(leaf, tensors, what) for leaf in leaves]], tensors


def from_note(note: Any, tensors: Sequence[torch.Tensor | None]) -> Any:
    """The inverse of `to_note`."""
    text, leaves = note
    return pytree.tree_unflatten([_unpacked(leaf, tensors) for leaf in leaves], pytree.treespec_loads(text))


def rows_to_note(rows: Rows, what: str) -> SentRows:
    """Rows as `to_note`, with their places."""
    places, (note, tensors) = rows.places, to_note(rows.values, what)
    return [[places.start, places.stop, places.step], note], [*tensors]


def rows_from_note(note: Any, tensors: Sequence[torch.Tensor | None]) -> Rows:
    """The inverse of `rows_to_note`."""
    (start, stop, step), values = note
    return Rows(range(start, stop, step), from_note(values, tensors))


def join(parts: Sequence[Rows], what: str) -> Rows:
    """Rows of several slices as those of one, each sample in its place.

    Args:
        parts: Of consecutive places all together.
        what: What they are, for errors.

    Raises:
        TaskError: They cannot be put together.
    """
    ordered = sorted(parts, key=lambda rows: rows.places.start)
    if len(ordered) == 1:
        return ordered[0]
    places = [place for rows in ordered for place in rows.places]
    order = None if places == sorted(places) else np.argsort(places, kind="stable")
    sizes = [len(rows.places) for rows in ordered]
    values = tuple(
        _join_nests(of_value, sizes, order, what) for of_value in zip(*(rows.values for rows in ordered), strict=True)
    )
    return Rows(range(min(places), max(places) + 1), values)


def _join_nests(nests: Sequence[Any], sizes: list[int], order: Any, what: str) -> Any:
    apart = [_taken_apart(nest) for nest in nests]
    spec = apart[0][1]
    for _, other in apart:
        if str(other) != str(spec):
            raise _differ(what, str(spec), str(other))
    columns = zip(*(leaves for leaves, _ in apart), strict=True)
    return pytree.tree_unflatten([_joined(column, sizes, order, what) for column in columns], spec)


def _joined(column: tuple[Any, ...], sizes: list[int], order: Any, what: str) -> Any:
    first = column[0]
    if isinstance(first, (torch.Tensor, np.ndarray)):
        return _joined_tensors(column, sizes, order, what)
    if isinstance(first, (list, tuple)):
        if not _have_entries(column, sizes, what):
            if len({len(part) for part in column}) > 1:
                raise _differ(what, f"a list of {len(first)}", f"of {[len(part) for part in column]}")
            return [_join_nests(entries, sizes, order, what) for entries in zip(*column, strict=True)]
        entries = [entry for part in column for entry in part]
        return type(first)(entries if order is None else [entries[i] for i in order])
    if any(not _same(first, other) for other in column[1:]):
        raise TaskError(f"{what} are {first!r} and {column[1]!r}, without a row for each sample: return tensors.")
    return first


def _joined_tensors(column: tuple[Any, ...], sizes: list[int], order: Any, what: str) -> Any:
    shapes = [tuple(part.shape) for part in column]
    if any(len(shape) == 0 for shape in shapes):
        raise TaskError(f"{what} are numbers, without a row for each sample: return one row for each.")
    if len({shape[1:] for shape in shapes}) > 1:
        odd = next(shape for shape in shapes if shape[1:] != shapes[0][1:])
        raise TaskError(
            f"{what} differ in shape from slice to slice, {shapes[0]} and {odd}, so they cannot be put together: "
            "pad all batches to one length, or reduce them."
        )
    if order is not None and [shape[0] for shape in shapes] != sizes:
        raise TaskError(
            f"{what} have {shapes[0][0]} rows for {sizes[0]} samples of a stream, so their order is not known: "
            "return one row for each sample, or give a data set with a length."
        )
    if isinstance(column[0], torch.Tensor):
        whole = torch.cat(column)
        return whole if order is None else whole[torch.as_tensor(order, device=whole.device)]
    array = np.concatenate(column)
    return array if order is None else array[order]


def _have_entries(column: Sequence[Any], sizes: list[int], what: str) -> bool:
    """Whether lists have an entry for each sample; else they are always of the same few values.

    Raises:
        TaskError: They may be either, for all that is known of them.
    """
    if [len(part) for part in column] != sizes:
        return False
    if len(set(sizes)) == 1 and all(has_rows(entry, sizes[0]) for part in column for entry in part):
        size = sizes[0]
        raise TaskError(
            f"{what} are lists of {size} values of {size} rows, which may be one for each of {size} samples or not: "
            "give a tuple, or use another batch size."
        )
    return True


def _same(one: Any, other: Any) -> bool:
    return one is other or (type(one) in _PLAIN and type(one) is type(other) and bool(one == other))


def _taken_apart(value: Any) -> tuple[list[Any], Any]:
    """Leaves and structure of a nest; a list is a leaf, because it may have an entry for each sample."""
    leaves, spec = pytree.tree_flatten(value, is_leaf=_is_list)
    return leaves, spec


def _is_list(value: Any) -> bool:
    return type(value) is list or (type(value) is tuple and value != () and all(type(one) in _PLAIN for one in value))


def _packed(value: Any, tensors: Any, what: str) -> Any:
    """A leaf as plain data; its tensors are appended to `tensors`."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        tensor = value if isinstance(value, torch.Tensor) else None
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            tensor = torch.from_numpy(np.ascontiguousarray(value))
        if tensor is not None and tensor.layout == torch.strided:
            tensors.append(tensor.detach())
            return ["tensor" if isinstance(value, torch.Tensor) else "array", len(tensors) - 1]
    elif isinstance(value, np.generic):
        return ["plain", value.item()]
    elif type(value) in _PLAIN:
        return ["plain", value]
    elif type(value) in (list, tuple):
        return [type(value).__name__, [_packed(entry, tensors, what) for entry in value]]
    elif type(value) is dict and all(type(key) is str for key in value):
        return ["dict", {key: _packed(entry, tensors, what) for key, entry in value.items()}]
    raise TaskError(
        f"{what} hold a value of type {type(value).__name__}, which ranks cannot send to each other: return tensors, "
        "arrays, strings and numbers, in tuples, lists or dicts."
    )


def _unpacked(packed: Any, tensors: Sequence[torch.Tensor | None]) -> Any:
    kind, content = packed
    if kind in ("tensor", "array"):
        tensor = tensors[content]
        assert tensor is not None
        return tensor if kind == "tensor" else tensor.numpy()
    if kind in ("list", "tuple"):
        entries = [_unpacked(entry, tensors) for entry in content]
        return entries if kind == "list" else tuple(entries)
    if kind == "dict":
        return {key: _unpacked(entry, tensors) for key, entry in content.items()}
    return content


def _differ(what: str, one: str, other: str) -> TaskError:
    return TaskError(
        f"{what} differ in structure from slice to slice, {one} and {other}: return the same tuple or dict for each."
    )


def without_rowless(value: Any, samples: int) -> tuple[Any, list[str]]:
    """A dict or model output without the entries that have no row for each sample; and their keys.

    A loss is such an entry, and a cache of keys and values.
    """
    if not isinstance(value, Mapping):
        return value, []
    dropped = [str(key) for key, entry in value.items() if not has_rows(entry, samples)]
    if not dropped or len(dropped) == len(value):
        return value, []
    return type(value)(**{k: v for k, v in value.items() if str(k) not in dropped}), dropped


def has_rows(value: Any, samples: int) -> bool:
    """Whether a nest has a row for each sample."""
    return all(
        leaf is None
        or (_is_list(leaf) and (len(leaf) == samples or all(has_rows(entry, samples) for entry in leaf)))
        or (isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim > 0 and len(leaf) == samples)
        for leaf in _taken_apart(value)[0]
    )

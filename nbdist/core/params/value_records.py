"""Records of values: each compares one value with what it was, and puts it back in place."""

from __future__ import annotations

import collections
import pickle
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from nbdist.core.params.param_data_watch import get_data, set_data
from nbdist.core.params.placeholder import is_placeholder

__all__ = [
    "ATOMS", "ArrayRecord", "AttributesRecord", "CellRecord", "ClassRecord", "DictRecord", "GeneratorRecord",
    "GlobalRecord", "Record", "SequenceRecord", "SetRecord", "SlotRecord", "TensorRecord", "cell_value", "items_of",
    "same_state", "same_values",
]  # fmt: skip

ATOMS = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device, torch.Size, range, slice, type)
"""Types of values that cannot be changed, and are compared by value."""


class Record(ABC):
    """One value to compare and to put back.

    Attributes:
        nbytes: The memory that the copy takes, if it is a tensor or an array.
    """

    nbytes = 0

    def __init__(self, path: str) -> None:
        self.path = path

    @abstractmethod
    def changes(self) -> list[str]:
        """The paths of what has changed."""

    @abstractmethod
    def restore(self) -> None:
        """Put it back."""


class TensorRecord(Record):
    """The values and the memory of a tensor, unless it is made without `values`, and its gradient."""

    def __init__(self, path: str, tensor: Any, keep_storage: bool, *, values: bool = True) -> None:
        super().__init__(path)
        self.tensor = tensor
        self._keep_storage = keep_storage
        self._version: int | None = None
        self._gradient = tensor.grad if tensor.is_leaf else None
        self._needs_gradient = tensor.requires_grad
        self._data: torch.Tensor | None = None
        self._values: torch.Tensor | None = None
        if values and tensor.layout == torch.strided and not tensor.is_meta and not is_placeholder(tensor):
            data = get_data(tensor)
            # A dummy of a mesh, or another subclass, need not hold a value for each element.
            if type(data) in (torch.Tensor, nn.Parameter) and data.untyped_storage().nbytes() >= data.nbytes:
                self._data, self._values = data, data.clone()
                self.nbytes = data.nbytes
                self._version = None if tensor.is_inference() else tensor._version

    @property
    def written(self) -> bool:
        """Whether it was written in place since."""
        return self._version is not None and self.tensor._version != self._version

    def changes(self) -> list[str]:
        """See `Record`."""
        return [] if self._values is None or self._is_same(get_data(self.tensor)) else [self.path]

    def _is_same(self, data: torch.Tensor) -> bool:
        assert self._values is not None
        return data.shape == self._values.shape and data.dtype == self._values.dtype and same_values(data, self._values)

    def restore(self) -> None:
        """See `Record`."""
        if self._values is not None and self._data is not None and not is_placeholder(self.tensor):
            now = get_data(self.tensor)
            if not self._keep_storage and _place(now) != _place(self._data):
                set_data(self.tensor, self._data)
                now = self._data
            # By way of `data`, unnoticed by autograd and by whoever compares versions.
            if now.shape == self._values.shape and not self._is_same(now):
                now.copy_(self._values)
        if self.tensor.is_leaf:
            self.tensor.grad = self._gradient
            if self.tensor.requires_grad != self._needs_gradient:
                self.tensor.requires_grad_(self._needs_gradient)


class ArrayRecord(Record):
    """The values of a NumPy array."""

    def __init__(self, path: str, array: Any) -> None:
        super().__init__(path)
        self._array, self._values, self.nbytes = array, array.copy(), array.nbytes

    def changes(self) -> list[str]:
        """See `Record`."""
        return [] if self._array.tobytes() == self._values.tobytes() else [self.path]

    def restore(self) -> None:
        """See `Record`."""
        self._array[...] = self._values


class DictRecord(Record):
    """The items of a dict."""

    def __init__(self, path: str, value: dict[Any, Any]) -> None:
        super().__init__(path)
        self._value, self._items = value, list(items_of(value))

    def changes(self) -> list[str]:
        """See `Record`."""
        return [] if _same_pairs(list(items_of(self._value)), self._items) else [self.path]

    def restore(self) -> None:
        """See `Record`."""
        if not _same_pairs(list(items_of(self._value)), self._items):
            kind: Any = collections.OrderedDict if isinstance(self._value, collections.OrderedDict) else dict
            kind.clear(self._value)
            kind.update(self._value, self._items)


class AttributesRecord(DictRecord):
    """Attributes of an object: each has a path of its own."""

    def changes(self) -> list[str]:
        """See `Record`."""
        before, now = dict(self._items), self._value
        missing = object()
        return [
            f"{self.path}.{name}" for name in {**before, **now}
            if not _same(before.get(name, missing), now.get(name, missing))
        ]  # fmt: skip


class SequenceRecord(Record):
    """The items of a list or a deque."""

    def __init__(self, path: str, value: Any) -> None:
        super().__init__(path)
        self._value, self._items = value, list(value)

    def changes(self) -> list[str]:
        """See `Record`."""
        now = list(self._value)
        same = len(now) == len(self._items) and all(map(_same, now, self._items))
        return [] if same else [self.path]

    def restore(self) -> None:
        """See `Record`."""
        if self.changes():
            self._value.clear()
            self._value.extend(self._items)


class SetRecord(SequenceRecord):
    """The items of a set."""

    def changes(self) -> list[str]:
        """See `Record`."""
        return [] if set(self._value) == set(self._items) else [self.path]

    def restore(self) -> None:
        """See `Record`."""
        if self.changes():
            self._value.clear()
            self._value.update(self._items)


class SlotRecord(Record):
    """An attribute that has a slot."""

    def __init__(self, path: str, owner: Any, name: str) -> None:
        super().__init__(path)
        self._owner, self._name, self._value = owner, name, getattr(owner, name)

    def changes(self) -> list[str]:
        """See `Record`."""
        return [] if _same(getattr(self._owner, self._name, None), self._value) else [self.path]

    def restore(self) -> None:
        """See `Record`."""
        if self.changes():
            setattr(self._owner, self._name, self._value)


class CellRecord(Record):
    """A variable of a closure."""

    def __init__(self, path: str, cell: types.CellType) -> None:
        super().__init__(path)
        self._cell, self._value = cell, cell_value(cell)

    def changes(self) -> list[str]:
        """See `Record`."""
        now = cell_value(self._cell)
        return [] if len(now) == len(self._value) and all(map(_same, now, self._value)) else [self.path]

    def restore(self) -> None:
        """See `Record`."""
        if not self.changes():
            return
        if self._value:
            self._cell.cell_contents = self._value[0]
        else:
            del self._cell.cell_contents


class GlobalRecord(Record):
    """What a global name stands for."""

    def __init__(self, name: str, names: dict[str, Any]) -> None:
        super().__init__(name)
        self._names, self._value = names, names[name]

    def changes(self) -> list[str]:
        """See `Record`."""
        return [] if _same(self._names.get(self.path), self._value) else [self.path]

    def restore(self) -> None:
        """See `Record`."""
        self._names[self.path] = self._value


class ClassRecord(Record):
    """The attributes of a class that are atoms."""

    def __init__(self, path: str, kind: type) -> None:
        super().__init__(path)
        self._kind = kind
        self._values = self._now()

    def _now(self) -> dict[str, Any]:
        return {
            name: value for name, value in vars(self._kind).items()
            if isinstance(value, ATOMS) and not name.startswith("__")
        }  # fmt: skip

    def changes(self) -> list[str]:
        """See `Record`."""
        now, missing = self._now(), object()
        return [
            f"{self.path}.{name}" for name in {**self._values, **now}
            if not _same(self._values.get(name, missing), now.get(name, missing))
        ]  # fmt: skip

    def restore(self) -> None:
        """See `Record`."""
        if self.changes():
            for name in self._now().keys() - self._values.keys():
                delattr(self._kind, name)
            for name, value in self._values.items():
                setattr(self._kind, name, value)


class GeneratorRecord(Record):
    """A generator of random numbers."""

    def __init__(self, path: str, get: Callable[[], Any], put: Callable[[Any], Any]) -> None:
        super().__init__(path)
        self._get, self._put, self._state = get, put, get()

    def changes(self) -> list[str]:
        """See `Record`."""
        now, before = self._get(), self._state
        same = pickle.dumps(now) == pickle.dumps(before)
        return [] if same else [self.path]

    def restore(self) -> None:
        """See `Record`."""
        self._put(self._state)


def same_values(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors of one shape and dtype hold the same values; NaN is the same as NaN. Local."""
    if torch.equal(first, second):
        return True
    if not (first.is_floating_point() or first.is_complex()):
        return False
    return bool(((first == second) | ((first != first) & (second != second))).all())


def _place(data: torch.Tensor) -> tuple[Any, ...]:
    return data.data_ptr(), data.shape, data.stride(), data.dtype


def _same(first: Any, second: Any) -> bool:
    """Whether two values are the same object, or equal atoms."""
    return first is second or (type(first) is type(second) and isinstance(first, ATOMS) and first == second)


def _same_pairs(first: list[tuple[Any, Any]], second: list[tuple[Any, Any]]) -> bool:
    return len(first) == len(second) and all(a[0] is b[0] and a[1] is b[1] for a, b in zip(first, second, strict=True))


def items_of(value: dict[Any, Any]) -> Any:
    """The items that a dict holds. Local."""
    kind: Any = collections.OrderedDict if isinstance(value, collections.OrderedDict) else dict
    return kind.items(value)  # a subclass may show others


def cell_value(cell: types.CellType) -> list[Any]:
    """The value of a cell; none while its variable is not assigned."""
    try:
        return [cell.cell_contents]
    except ValueError:
        return []


def same_state(first: Any, second: Any) -> bool:
    """Whether two extra states, nests of containers and tensors, are equal. Local."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.shape == second.shape and first.dtype == second.dtype and same_values(first, second)
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return first.keys() == second.keys() and all(same_state(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same_state, first, second))
    return bool(first == second)

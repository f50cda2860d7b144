"""The state of all that a training step can reach: to see what the step changes, and to put it back."""

from __future__ import annotations

import collections
import contextlib
import dis
import functools
import io
import itertools
import logging
import os
import random
import sys
import sysconfig
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nbdist.core.params.value_records import (
    ATOMS,
    ArrayRecord,
    AttributesRecord,
    CellRecord,
    ClassRecord,
    DictRecord,
    GeneratorRecord,
    GlobalRecord,
    Record,
    SequenceRecord,
    SetRecord,
    SlotRecord,
    TensorRecord,
    cell_value,
    items_of,
)

__all__ = ["ProgramState", "is_of_library"]

_LARGE_BYTES = 64 * 2**20
_MOST = 200_000
"""How many objects are visited, which takes about a second; a step that reaches more is not checked."""
_MANY = 1000
"""A container with more items is taken for data if the first of them are atoms."""
_LEFT_ALONE = (
    types.ModuleType, types.CodeType, types.BuiltinFunctionType, logging.Logger, logging.Handler, threading.Thread,
    io.IOBase, weakref.ref, property, staticmethod, classmethod,
)  # fmt: skip


def _has_packages(folder: str) -> bool:
    """Whether packages were installed into a folder: also one of ``pip install --user`` or ``--target``."""
    try:
        return any(name.endswith(".dist-info") for name in os.listdir(folder))
    except OSError:
        return False


_LIBRARIES = tuple(
    os.path.realpath(path) + os.sep
    for path in {
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        os.path.dirname(torch.__path__[0]),
        *(folder for folder in sys.path if folder and _has_packages(folder)),
    }
)
_NBDIST = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", "..")) + os.sep


class ProgramState:
    """The values of everything that can be reached from some objects, when it was made.

    Reached are attributes, items, what functions of the user (not of installed packages) take from their globals,
    closures and defaults, and what the methods of the user's classes do. Files, sockets, other processes and modules
    are not.

    Args:
        roots: The objects, by the names that the user knows them by.
        keep_storage: Whether tensors keep the memory that they have when they are put back, and only get their values:
            for a model on a mesh, whose strategy decides where they lie.
        unwritten: Tensors whose values nothing will change, such as weights in a dry run: they are not copied.
        large_bytes: Larger tensors and arrays that are no part of a model or an optimizer are taken for data, which is
            only read.
        most: How many objects are visited; None for all.

    Attributes:
        iterators: Iterators, which nobody can put back, by their paths.
        excess: The path at which more objects were reached than can be put back; empty if all were.
    """

    def __init__(
        self, roots: Mapping[str, Any], *, keep_storage: bool = False, unwritten: Iterable[torch.Tensor] = (),
        large_bytes: int = _LARGE_BYTES, most: int | None = _MOST,
    ) -> None:  # fmt: skip
        self._large_bytes = large_bytes
        self._keep_storage = keep_storage
        self.iterators: dict[str, Any] = {}
        self.excess = ""
        self._records: list[Record] = []
        self._unwritten = {id(tensor) for tensor in unwritten}
        self._seen: dict[Any, Any] = {}  # held, so that no id comes twice
        self._queue: collections.deque[tuple[str, Any]] = collections.deque(roots.items())
        # They are known to change these, however large they are.
        changing = [root for root in roots.values() if isinstance(root, (nn.Module, torch.optim.Optimizer))]
        self._own = {id(tensor) for root in changing for tensor in _tensors(root)}
        while self._queue:
            self._visit(*self._queue.popleft())
            if most is not None and len(self._seen) + len(self._queue) > most:
                self.excess = self._queue[-1][0] if self._queue else "itself"
                self._queue.clear()

    @property
    def nbytes(self) -> int:
        """How much memory the copies of tensors and arrays take."""
        return sum(record.nbytes for record in self._records)

    def changes(self) -> list[str]:
        """The paths of what has changed since, as ``model.encoder.calls``."""
        return [path for record in self._records for path in record.changes()]

    def written(self) -> list[str]:
        """The paths of tensors that were written since, if only with the values that they had."""
        return [one.path for one in self._records if isinstance(one, TensorRecord) and (one.written or one.changes())]

    def restore(self) -> None:
        """Put everything back, in place: each object stays the same object. Local."""
        with torch.no_grad():
            for record in reversed(self._records):
                record.restore()

    def _visit(self, path: str, value: Any) -> None:
        if isinstance(value, ATOMS) or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, _LEFT_ALONE) or _is_ours(value) or _is_context(value):
            return
        if isinstance(value, torch.Tensor):
            if id(value) in self._unwritten:
                self._records.append(TensorRecord(path, value, self._keep_storage, values=False))
            elif id(value) in self._own or _bytes(value) <= self._large_bytes:
                self._records.append(TensorRecord(path, value, self._keep_storage))
            self._attributes(path, value)
        elif isinstance(value, np.ndarray):
            if value.nbytes <= self._large_bytes and value.flags.writeable:
                self._records.append(ArrayRecord(path, value))
        elif isinstance(value, dict):
            self._container(path, value, DictRecord, ((f"{path}[{key!r}]", item) for key, item in items_of(value)))
            self._attributes(path, value)
        elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
            kind = None if isinstance(value, (tuple, frozenset)) else _RECORDS[_base(value)]
            self._container(path, value, kind, ((f"{path}[{i}]", item) for i, item in enumerate(value)))
            self._attributes(path, value)
        elif isinstance(value, types.FunctionType):
            self._function(path, value)
        elif isinstance(value, types.MethodType):
            self._queue += [(path, value.__self__), (path, value.__func__)]
        elif isinstance(value, functools.partial):
            self._queue += [(path, value.func), (f"{path}.args", value.args), (f"{path}.keywords", value.keywords)]
        elif (pair := _generator_state(value)) is not None:
            self._records.append(GeneratorRecord(path, *pair))
        elif hasattr(type(value), "__next__") and not hasattr(type(value), "write"):  # a file is outside
            self.iterators[path] = value
        else:
            self._attributes(path, value)
            self._class(type(value))

    def _container(self, path: str, value: Any, kind: Any, items: Iterator[tuple[str, Any]]) -> None:
        if kind is not None:
            self._records.append(kind(path, value))
        held = (item for _, item in items_of(value)) if isinstance(value, dict) else value
        if len(value) > _MANY and all(isinstance(item, ATOMS) for item in itertools.islice(held, _MANY)):
            return
        self._queue += ((name, item) for name, item in items if not isinstance(item, ATOMS))

    def _attributes(self, path: str, value: Any) -> None:
        names = getattr(value, "__dict__", None)
        if isinstance(names, dict) and id(names) not in self._seen:
            self._seen[id(names)] = names
            self._records.append(AttributesRecord(path, names))
            self._queue += self._attribute_items(path, value, names)
        for kind in type(value).__mro__:
            for name in _slotted(kind):
                if hasattr(value, name):
                    self._records.append(SlotRecord(f"{path}.{name}", value, name))
                    self._queue.append((f"{path}.{name}", getattr(value, name)))

    def _attribute_items(self, path: str, value: Any, names: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, item in names.items():
            if isinstance(item, ATOMS):
                continue
            if isinstance(value, nn.Module) and name in ("_modules", "_parameters", "_buffers"):
                self._seen[id(item)] = item
                self._records.append(AttributesRecord(path, item))
                yield from ((f"{path}.{inner}", held) for inner, held in item.items())
            else:
                yield f"{path}.{name}", item

    def _function(self, path: str, function: types.FunctionType) -> None:
        self._attributes(path, function)
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._queue.append((path, value))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            if id(cell) not in self._seen:
                self._seen[id(cell)] = cell
                self._records.append(CellRecord(name, cell))
                self._queue += [(name, value) for value in cell_value(cell)]
        if is_of_library(function.__code__):
            return
        names = function.__globals__
        for name in sorted(_names_in(function.__code__)):
            if name in names and (key := (id(names), name)) not in self._seen:
                self._seen[key] = names
                self._records.append(GlobalRecord(name, names))
                self._queue.append((name, names[name]))
                if isinstance(names[name], type):
                    self._class(names[name])

    def _class(self, kind: type) -> None:
        """What the methods of a user's class reach, and its own attributes."""
        for base in kind.__mro__:
            if id(base) in self._seen:
                continue
            self._seen[id(base)] = base
            functions = [_function_of(value) for value in vars(base).values()]
            mine = [function for function in functions if function is not None]
            if not any(not is_of_library(function.__code__) for function in mine):
                continue
            self._records.append(ClassRecord(base.__qualname__, base))
            self._queue += ((base.__qualname__, function) for function in mine)
            self._queue += (
                (f"{base.__qualname__}.{name}", value) for name, value in vars(base).items()
                if isinstance(value, (dict, list, set, collections.deque, torch.Tensor, np.ndarray))
            )  # fmt: skip


_RECORDS: dict[type, type[Record]] = {list: SequenceRecord, collections.deque: SequenceRecord, set: SetRecord}


def _base(value: Any) -> type:
    return next(kind for kind in _RECORDS if isinstance(value, kind))


@functools.lru_cache(1024)
def _slotted(kind: type) -> list[str]:
    names = vars(kind).get("__slots__", ())
    names = [names] if isinstance(names, str) else names
    return [name for name in names if isinstance(vars(kind).get(name), types.MemberDescriptorType)]


def _function_of(value: Any) -> types.FunctionType | None:
    """The function of a method, a property or a decorator that keeps what it wraps."""
    value = value.fget if isinstance(value, property) else getattr(value, "__func__", value)
    return value if isinstance(value, types.FunctionType) else None


@functools.lru_cache(4096)
def _names_in(code: types.CodeType) -> frozenset[str]:
    """The names that a function's code, and that of functions inside it, takes from globals; no attributes."""
    inner = [_names_in(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    own = {each.argval for each in dis.get_instructions(code) if each.opname.endswith(("_GLOBAL", "_NAME"))}
    return frozenset(own.intersection(code.co_names).union(*inner))


def is_of_library(code: types.CodeType) -> bool:
    """Whether code is nbdist's, Python's or an installed package's, and not the user's. Local."""
    return _is_of_library(code.co_filename)


@functools.lru_cache(4096)  # by file: a class of torch has a hundred functions, and a path takes ten system calls
def _is_of_library(path: str) -> bool:
    if path.startswith("<frozen"):
        return True
    return os.path.realpath(path).startswith((*_LIBRARIES, _NBDIST)) if os.path.isabs(path) else False


def _is_ours(value: Any) -> bool:
    """Whether an object is nbdist's own, such as a hook of a strategy, behind which the memory of all ranks lies."""
    if isinstance(value, types.FunctionType):
        return value.__module__ is not None and value.__module__.startswith("nbdist.")
    return type(value).__module__.startswith("nbdist.") and not isinstance(value, nn.Module)


def _is_context(value: Any) -> bool:
    """Whether an object is a context made of a generator, which makes a new one for each call that it decorates."""
    return isinstance(value, contextlib.ContextDecorator) and type(value).__module__ == "contextlib"


def _generator_state(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How a generator's state is read and set; None for other objects."""
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    if isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, np.random.RandomState):
        return value.get_state, value.set_state
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        return lambda: bits.state, lambda state: setattr(bits, "state", state)
    return None


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors of a model, of an optimizer or of a nest of containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from (*value.parameters(), *value.buffers())
    elif isinstance(value, (dict, list, tuple, torch.optim.Optimizer)):
        inner = vars(value).values() if isinstance(value, torch.optim.Optimizer) else value
        for each in inner.values() if isinstance(inner, dict) else inner:
            yield from _tensors(each)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes if tensor.layout == torch.strided else 0

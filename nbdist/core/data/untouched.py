"""A copy of data to read a first sample from, so that what a read opens or counts is not the user's own object's."""

from __future__ import annotations

import contextlib
import copy
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

__all__ = ["untouched"]

_SHARED = (
    str, bytes, int, float, complex, bool, type(None), torch.Tensor, np.ndarray, np.generic, type, types.ModuleType,
    types.FunctionType, types.BuiltinFunctionType, types.CodeType,
)  # fmt: skip
_MANY = 1000
"""A container with more items is data, and shared."""
_MOST = 10_000
"""How many objects are copied; further ones are shared."""


@contextlib.contextmanager
def untouched(data: Any) -> Iterator[Any]:
    """Context with a copy of `data`: objects and small containers are copied, tensors and large containers not. Local.

    What a method of the data's class assigns to a global of its own module is put back.
    """
    copier = _Copier()
    copied = copier.copied(data)
    names = {(id(scope), name): scope for kind in copier.kinds for scope, name in _assigned_globals(kind)}
    before = [(scope, name, scope[name]) for (_, name), scope in names.items()]
    try:
        yield copied
    finally:
        for scope, name, value in before:
            if scope.get(name) is not value:
                scope[name] = value


class _Copier:
    """Copies what can be reached from an object, once each."""

    def __init__(self) -> None:
        self._made: dict[int, Any] = {}
        self._kept: list[Any] = []  # so that no id is used twice
        self.kinds: set[type] = set()

    def copied(self, value: Any) -> Any:
        if isinstance(value, _SHARED) or len(self._made) > _MOST:
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        self._kept.append(value)
        made = self._made[id(value)] = self._copy(value)
        return made

    def _copy(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, (random.Random, np.random.Generator, np.random.RandomState)):
            return copy.deepcopy(value)
        if kind is types.MethodType:
            return types.MethodType(value.__func__, self.copied(value.__self__))
        if kind in (list, tuple, dict, set) and len(value) > _MANY:
            return value
        if kind is tuple:
            return tuple(self.copied(item) for item in value)
        if kind is list:
            made: Any = []
            self._made[id(value)] = made
            made.extend(self.copied(item) for item in value)
            return made
        if kind is dict:
            made = {}
            self._made[id(value)] = made
            made.update((key, self.copied(item)) for key, item in value.items())
            return made
        return self._object(value)

    def _object(self, value: Any) -> Any:
        try:
            made = copy.copy(value)
        except Exception:  # a lock, a file, or an object whose class does not allow it: shared
            return value
        self._made[id(value)] = made
        self.kinds.add(type(value))
        names = getattr(made, "__dict__", None)
        if made is value or not isinstance(names, dict) or names is getattr(value, "__dict__", None):
            return made
        for name, item in list(names.items()):
            names[name] = self.copied(item)
        return made


def _assigned_globals(kind: type) -> Iterator[tuple[dict[str, Any], str]]:
    """The globals that methods of a class, and functions that they call, may assign."""
    todo = [value for base in kind.__mro__ for value in vars(base).values() if isinstance(value, types.FunctionType)]
    seen: set[int] = set()
    while todo:
        function = todo.pop()
        if id(function) in seen or function.__module__.partition(".")[0] in ("torch", "numpy"):
            continue
        seen.add(id(function))
        for name in function.__code__.co_names:
            if name in function.__globals__:
                yield function.__globals__, name
                value = function.__globals__[name]
                if isinstance(value, types.FunctionType) and value.__globals__ is function.__globals__:
                    todo.append(value)

"""Object paths: where in a value an object is, as the user would write it: ``model.encoder.logger``."""

from __future__ import annotations

import collections
import functools
import types
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from nbdist.core.transfer.slots import slot_names

__all__ = ["path_to"]

_ATOMS = (bool, int, float, complex, str, bytes, type(None), types.ModuleType, types.BuiltinFunctionType)
_TABLES = ("_parameters", "_buffers", "_modules")


def path_to(found: Any, roots: Mapping[str, Any]) -> str:
    """The shortest path to an object from one of the roots, those first that are named first; empty without one.

    Args:
        found: The object.
        roots: Values by name.
    """
    for name, root in roots.items():
        path = _search(found, name, root)
        if path:
            return path
    return ""


def _search(found: Any, name: str, root: Any) -> str:
    kept, seen = [root], {id(root)}  # kept, so that no id is used twice
    todo = collections.deque([(name, root)])
    while todo:
        path, value = todo.popleft()
        if value is found:
            return path
        for label, child in _children(value):
            if id(child) not in seen and not isinstance(child, _ATOMS):
                seen.add(id(child))
                kept.append(child)
                todo.append((path + label, child))
    return ""


def _children(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, each with what is appended to the object's path."""
    kind = type(value)
    if issubclass(kind, types.FunctionType):
        yield from _of_function(value)
    elif issubclass(kind, types.MethodType):
        yield from (("", value.__self__), ("", value.__func__))
    elif issubclass(kind, functools.partial):
        yield from (("", value.func), ("", value.args), ("", value.keywords))
    elif issubclass(kind, (staticmethod, classmethod)):
        yield "", value.__func__
    elif issubclass(kind, property):
        yield from (("", value.fget), ("", value.fset))
    elif issubclass(kind, weakref.ref):
        yield "()", value()
    elif issubclass(kind, (dict, types.MappingProxyType)):
        for key, item in list(value.items()):
            yield (f"[{key!r}]" if isinstance(key, (str, int)) else "[...]"), item
            yield " (a key)", key
    elif issubclass(kind, (list, tuple, set, frozenset, collections.deque)):
        names = getattr(kind, "_fields", ())
        for i, item in enumerate(list(value)):
            yield (f".{names[i]}" if i < len(names) else f"[{i}]"), item
    if not issubclass(kind, (type, types.FunctionType)):
        yield "'s class", kind
    attributes = {} if issubclass(kind, types.FunctionType) else getattr(value, "__dict__", {})
    for name, item in list(attributes.items()):
        if name in _TABLES and issubclass(kind, nn.Module):
            yield from ((f".{key}", one) for key, one in item.items())
        else:
            yield f".{name}", item
    for name in () if issubclass(kind, type) else slot_names(kind):
        if hasattr(value, name):
            yield f".{name}", getattr(value, name)


def _of_function(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    name = function.__name__
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f", {variable} in {name}", cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for variable in _names(function.__code__):
        if variable in function.__globals__:
            yield f", {variable} in {name}", function.__globals__[variable]
    for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield f", a default of {name}", value
    yield from ((f".{key}", value) for key, value in vars(function).items())


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(one) for one in code.co_consts if isinstance(one, types.CodeType))
    return set(code.co_names).union(*inner)

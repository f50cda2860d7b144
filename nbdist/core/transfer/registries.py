"""Registries: containers of an imported module in which a library enters what is made, such as every layer by its name.

What is imported is sent by name, so the engine's own module would have an empty one. A registry that holds a module or
tensor that is sent is sent too, and so is what a library has entered under the class of a module, or its name.
"""

from __future__ import annotations

import collections
import importlib
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["ClassEntries", "Registry", "candidates", "class_entries"]

_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, weakref.WeakValueDictionary)
_KINDS = (*_MAPPINGS, list, set, weakref.WeakSet)
_WITHOUT = {"torch", "numpy", "nbdist", "IPython", "cloudpickle", "__main__", "__mp_main__"} | sys.stdlib_module_names


class Registry:
    """A container, by its place; unpickled, it has filled the one that is there.

    Args:
        module: The module's name.
        owner: The class in it whose attribute it is; empty for the module's own.
        name: The attribute.
        content: The container.
    """

    def __init__(self, module: str, owner: str, name: str, content: Any) -> None:
        self._place = module, owner, name
        self._content = content

    @property
    def objects(self) -> list[Any]:
        """The modules and tensors in it."""
        values = self._content.values() if isinstance(self._content, _MAPPINGS) else self._content
        return [value for value in list(values) if isinstance(value, (nn.Module, torch.Tensor))]

    def __reduce__(self) -> Any:
        items = self._content.items() if isinstance(self._content, _MAPPINGS) else self._content
        return _fill, (*self._place, list(items))


class ClassEntries:
    """What a mapping of a library has under classes that are sent; unpickled, it has filled what is missing there.

    Args:
        module: The module's name.
        owner: The class in it whose attribute the mapping is; empty for the module's own.
        name: The attribute.
        entries: A part of the mapping.
    """

    def __init__(self, module: str, owner: str, name: str, entries: dict[Any, Any]) -> None:
        self._place = module, owner, name
        self._entries = entries

    def __reduce__(self) -> Any:
        return _complete, (*self._place, self._entries)


def class_entries(classes: Iterable[type]) -> list[ClassEntries]:
    """What mappings in the packages of some classes have under these, or under their names. Local."""
    packages = {name for name in (kind.__module__.partition(".")[0] for kind in classes) if name not in _WITHOUT}
    keys = {key for kind in classes for key in _names_of(kind) if kind.__module__.partition(".")[0] in packages}
    found = []
    for name in sorted(name for name in list(sys.modules) if name.partition(".")[0] in packages):
        for owner, attributes in _owners_in(name):
            for key, value in list(attributes.items()):
                if isinstance(value, dict) and not key.startswith("__") and (mine := keys & dict.keys(value)):
                    found.append(ClassEntries(name, owner, key, {one: dict.__getitem__(value, one) for one in mine}))
    return found


def _names_of(kind: type) -> tuple[Any, ...]:
    return kind, str(kind), kind.__name__, kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}"


def _owners_in(name: str) -> list[tuple[str, Any]]:
    """The attributes of a module (under an empty name), and of each class that is defined in it."""
    module = sys.modules.get(name)
    if module is None:
        return []
    own = vars(module)
    classes = [(key, value) for key, value in list(own.items()) if isinstance(value, type) and value.__module__ == name]
    return [("", own), *((key, vars(value)) for key, value in classes)]


def candidates(modules: Iterable[str]) -> list[Registry]:
    """The registries of imported modules that hold any module or tensor. Local.

    Args:
        modules: Those of which something is sent by name.
    """
    found = []
    for name in sorted(name for name in modules if name.partition(".")[0] not in _WITHOUT):
        for owner, attributes in _owners_in(name):
            found += [Registry(name, owner, key, value) for key, value in _containers(attributes)]
    return [registry for registry in found if registry.objects]


def _containers(attributes: Any) -> Iterator[tuple[str, Any]]:
    for key, value in list(attributes.items()):
        if type(value) in _KINDS and not key.startswith("__"):
            yield key, value


def _at(module: str, owner: str, name: str) -> Any:
    """The container at a place here; None if there is none."""
    try:
        place = importlib.import_module(module)
    except ImportError:  # it was made when the other process ran, or is not installed here
        return None
    return getattr(getattr(place, owner) if owner else place, name, None)


def _complete(module: str, owner: str, name: str, entries: dict[Any, Any]) -> None:
    """Give the mapping that is here the entries that it lacks."""
    mapping = _at(module, owner, name)
    for key, value in entries.items() if isinstance(mapping, dict) else ():
        dict.setdefault(mapping, key, value)  # one's own `__setitem__` may compute the key


def _fill(module: str, owner: str, name: str, items: list[Any]) -> None:
    """Give the container that is here the content that was sent."""
    container = _at(module, owner, name)
    if container is None:
        return
    container.clear()
    if isinstance(container, list):
        container.extend(items)
    else:
        container.update(items)

"""Registries: containers of an imported module in which a library enters what is made, such as every layer by its name.

What is imported is sent by name, so the engine's own module would have an empty one. A registry that holds a module or
tensor that is sent is sent too.
"""

from __future__ import annotations

import collections
import sys
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["Registry", "candidates"]

_MAPPINGS = (dict, collections.OrderedDict, collections.defaultdict, weakref.WeakValueDictionary)
_KINDS = (*_MAPPINGS, list, set, weakref.WeakSet)
_WITHOUT = {"torch", "numpy", "nbdist", "IPython", "cloudpickle"} | sys.stdlib_module_names


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


def candidates(modules: Iterable[str]) -> list[Registry]:
    """The registries of imported modules that hold any module or tensor. Local.

    Args:
        modules: Those of which something is sent by name.
    """
    found = []
    for name in sorted(name for name in modules if name.partition(".")[0] not in _WITHOUT):
        module = sys.modules.get(name)
        owners = [("", vars(module))] if module is not None else []
        for key, value in list(owners[0][1].items()) if owners else ():
            if isinstance(value, type) and value.__module__ == name:
                owners.append((key, vars(value)))  # type: ignore[arg-type]
        for owner, attributes in owners:
            found += [Registry(name, owner, key, value) for key, value in _containers(attributes)]
    return [registry for registry in found if registry.objects]


def _containers(attributes: Any) -> Iterator[tuple[str, Any]]:
    for key, value in list(attributes.items()):
        if type(value) in _KINDS and not key.startswith("__"):
            yield key, value


def _fill(module: str, owner: str, name: str, items: list[Any]) -> None:
    """Give the container that is here the content that was sent."""
    __import__(module)
    place = sys.modules[module]
    container: Any = getattr(getattr(place, owner) if owner else place, name, None)
    if container is None:
        return
    container.clear()
    if isinstance(container, list):
        container.extend(items)
    else:
        container.update(items)

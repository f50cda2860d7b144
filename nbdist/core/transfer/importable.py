"""Which modules another process can import: what is defined in others is sent by value."""

from __future__ import annotations

import os
import sys
import weakref
from types import ModuleType
from typing import Any

__all__ = ["is_importable"]

_known: weakref.WeakKeyDictionary[ModuleType, bool] = weakref.WeakKeyDictionary()


def is_importable(module: ModuleType) -> bool:
    """Whether another process with this ``sys.path`` gets the same module by its name. Local.

    Not where it was loaded by its path, or made by code, also where the name is that of another one.
    """
    if module not in _known:
        _known[module] = _is_found(module)
    return _known[module]


def _is_found(module: ModuleType) -> bool:
    name = module.__name__
    top, _, rest = name.partition(".")
    own = getattr(module, "__file__", None)
    if sys.modules.get(name) is not module or (not own and rest):
        return True  # another name of a module, or one that its package makes when it is imported
    path = None
    for place, _ in enumerate(name.split("."), 1):
        spec = _spec(".".join(name.split(".")[:place]), path)
        if spec is None:
            package = getattr(sys.modules.get(top), "__file__", None)
            # A package may make modules by code, but not of files elsewhere.
            return place > 1 and bool(own and package) and _is_below(str(own), os.path.dirname(str(package)))
        path = spec.submodule_search_locations
    found = getattr(spec, "origin", None)
    if not own or not found or not os.path.exists(found) or not os.path.exists(own):
        return True
    return os.path.samefile(found, own) or os.path.splitext(found)[0] == os.path.splitext(own)[0]


def _spec(name: str, path: Any) -> Any:
    for finder in sys.meta_path:
        try:
            spec = finder.find_spec(name, path)
        except (AttributeError, ImportError, ValueError):
            continue
        if spec is not None:
            return spec
    return None


def _is_below(file: str, folder: str) -> bool:
    return os.path.abspath(file).startswith(os.path.abspath(folder) + os.sep)

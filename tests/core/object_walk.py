"""A walk over all that a value holds, described so that two processes can compare what they have."""

from __future__ import annotations

import collections
import copyreg
import dis
import enum
import functools
import logging
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nbdist.upstream.torch_private import tensor_hooks, without_torch_function

_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
_OF_CLASSES = ("__module__", "__dict__", "__weakref__", "__doc__", "_abc_impl", "__slotnames__", "__classcell__",
               "__abstractmethods__", "__firstlineno__", "__static_attributes__", "_value2member_map_")  # fmt: skip
_OF_WRAPPERS = ("__name__", "__qualname__", "__doc__", "__annotations__", "__wrapped__", "__module__", "fn")
"""What torch's pickling of the hooks of `load_state_dict` leaves out: the names of the function."""
_OWN = ("__main__", "loaded_")
_Refer = Callable[[Any], Any]


def walk(value: Any) -> list[dict[str, Any]]:
    """An entry for each object that is reachable; entries refer to each other by their place."""
    places: dict[int, int] = {}
    found: list[Any] = []

    def refer(one: Any) -> Any:
        if type(one) in _ATOMS:
            return repr(one)
        if id(one) not in places:
            places[id(one)] = len(found)
            found.append(one)
        return places[id(one)]

    refer(value)
    entries: list[dict[str, Any]] = []
    while len(entries) < len(found):
        entries.append(_entry(found[len(entries)], refer))
    return entries


def difference(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> str:
    """The first difference of two walks, as text; empty without one."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        for key in {**one, **other}:
            if one.get(key) != other.get(key):
                return f"object {place}, a {one.get('type')}: {key} {one.get(key)} became {other.get(key)}"
    return "" if len(first) == len(second) else f"{len(first)} objects became {len(second)}"


def _is_own(one: Any) -> bool:
    """Whether a class or function is of the notebook, or of a file loaded by its path, and not by import."""
    return (getattr(one, "__module__", None) or "__main__").startswith(_OWN)


def _name(one: Any) -> str:
    return f"{one.__module__}.{one.__qualname__}"


def _entry(one: Any, refer: _Refer) -> dict[str, Any]:
    kind = type(one)
    if isinstance(one, type):
        return _of_class(one, refer)
    if isinstance(one, (types.ModuleType, logging.Logger)):  # loggers are the process's own, by name
        return {"type": kind.__name__, "name": one.name if isinstance(one, logging.Logger) else one.__name__}
    if any(one is stream for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)):
        return {"type": "a stream of the process"}
    if isinstance(one, types.FunctionType):
        return _of_function(one, refer)
    if isinstance(one, types.MethodType):
        return {"type": "method", "of": refer(one.__self__), "function": refer(one.__func__)}
    if isinstance(one, types.BuiltinFunctionType):
        of = one.__self__
        return {"type": "builtin", "name": one.__name__, "of": None if isinstance(of, types.ModuleType) else refer(of)}
    if isinstance(one, (staticmethod, classmethod)):
        return {"type": kind.__name__, "function": refer(one.__func__)}
    if isinstance(one, property):
        return {"type": "property", "functions": [refer(one.fget), refer(one.fset), refer(one.fdel)]}
    entry = {"type": refer(kind) if _is_own(kind) else _name(kind), **_content(one, refer)}
    hidden = _OF_WRAPPERS if kind.__name__ == "_WrappedHook" else ()
    attributes = getattr(one, "__dict__", {})
    entry["attributes"] = {name: refer(attributes[name]) for name in sorted(attributes) if name not in hidden}
    slots = copyreg._slotnames(kind) if _is_own(kind) else ()
    entry["slots"] = {name: refer(getattr(one, name)) for name in sorted(slots) if hasattr(one, name)}
    return entry


def _content(one: Any, refer: _Refer) -> dict[str, Any]:
    """What an object holds beside attributes."""
    if isinstance(one, torch.Tensor):
        return _of_tensor(one, refer)
    if isinstance(one, torch.Generator):
        return {"state": one.get_state().tolist()}
    if isinstance(one, np.ndarray):
        objects = one.dtype == object
        values = [refer(item) for item in one.ravel()] if objects else one.tobytes()
        return {"shape": one.shape, "dtype": str(one.dtype), "values": values}
    if isinstance(one, enum.Enum):
        return {"name": one.name, "is that member": type(one)(one.value) is one}
    if isinstance(one, functools.partial):
        return {"partial": [refer(one.func), refer(one.args), refer(one.keywords)]}
    if isinstance(one, weakref.ref):
        return {"to": refer(one()), "callback": refer(one.__callback__)}
    if isinstance(one, weakref.WeakSet):
        return {"items": [refer(item) for item in one]}
    if isinstance(one, (dict, types.MappingProxyType, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)):
        more = {"factory": refer(one.default_factory)} if isinstance(one, collections.defaultdict) else {}
        return {"items": [(refer(key), refer(value)) for key, value in one.items()], **more}
    if isinstance(one, (set, frozenset)):
        return {"items": sorted((repr(item) if type(item) in _ATOMS else type(item).__name__) for item in one)}
    if isinstance(one, (list, tuple, collections.deque)):
        return {"items": [refer(item) for item in one], "length": getattr(one, "maxlen", None)}
    if isinstance(one, (int, float, str, bytes, bytearray)):
        base = next(base for base in type(one).__mro__ if base.__module__ == "builtins")
        return {"value": base.__repr__(one)}
    if isinstance(one, (range, slice, torch.dtype, torch.device, torch.finfo)):
        return {"value": repr(one)}
    return {}


def _of_tensor(one: Any, refer: _Refer) -> dict[str, Any]:
    with without_torch_function():
        plain = one.detach().as_subclass(torch.Tensor)
        entry = {
            "shape": tuple(plain.shape), "stride": plain.stride(), "dtype": str(plain.dtype), "leaf": one.is_leaf,
            "requires_grad": one.requires_grad, "values": plain.tolist(),
        }  # fmt: skip
        return {**entry, "hooks": [refer(hooks) for hooks in tensor_hooks(one)]} if one.is_leaf else entry


def _of_class(one: type, refer: _Refer) -> dict[str, Any]:
    if not _is_own(one):
        return {"type": "class", "name": _name(one)}
    own = {
        name: refer(value)
        for name, value in sorted(vars(one).items())
        if name not in _OF_CLASSES and not isinstance(value, (types.GetSetDescriptorType, types.MemberDescriptorType))
    }
    return {"type": "class", "name": _name(one), "bases": [refer(base) for base in one.__bases__], "own": own}


def _of_function(one: types.FunctionType, refer: _Refer) -> dict[str, Any]:
    own = _is_own(one)
    if not own and "<locals>" not in one.__qualname__:  # found there by its name
        return {"type": "function", "name": _name(one)}
    names = {i.argval for i in dis.get_instructions(one.__code__) if i.opname == "LOAD_GLOBAL"}
    used = sorted(names & one.__globals__.keys()) if own else []
    return {
        "type": "function", "name": _name(one), "code": one.__code__.co_code if own else None,
        "defaults": refer(one.__defaults__), "keyword defaults": refer(one.__kwdefaults__),
        "attributes": refer(vars(one)) if own else None,  # torch marks its own functions
        "variables": [refer(cell.cell_contents) for cell in one.__closure__ or ()],
        "globals": {name: refer(one.__globals__[name]) for name in used},
    }  # fmt: skip

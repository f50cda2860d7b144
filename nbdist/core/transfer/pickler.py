"""Pickles objects by value (cloudpickle), with tensors and arrays as out-of-band buffers (pickle protocol 5).

Types, identities, shared memory, attributes and hooks are preserved. torch's own pickling drops some of that, sometimes
with no more than a warning; here what cannot be sent is an error.
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import io
import pickle
import sys
import weakref
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any

import cloudpickle
import torch
from torch import fx, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized

from nbdist.core.transfer.file_memory import Extent, extent_of, mapping_together
from nbdist.core.transfer.importable import is_importable
from nbdist.core.transfer.process_state import LOCAL, LOCKS, refused_as, sent_local, sent_lock
from nbdist.core.transfer.rebuild import (
    as_mapped,
    as_storage,
    as_tensor,
    as_weak,
    dead,
    itself,
    restore,
    set_attributes,
    update,
    weak_method,
    with_cache,
)
from nbdist.core.transfer.refusal import Refusal
from nbdist.core.transfer.registries import ClassEntries, Registry, candidates, class_entries
from nbdist.core.transfer.slots import attributes, slot_names
from nbdist.upstream.cloudpickle_private import is_class_by_value, reduced_class
from nbdist.upstream.torch_private import (
    first_hook_number,
    neg_view,
    number_hooks_from,
    tensor_hooks,
    typed_storage,
    without_torch_function,
)

__all__ = ["dump", "load"]

_CONTAINERS = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_CACHED = type(functools.cache(len))
_STREAMS = ("stdout", "stderr", "__stdout__", "__stderr__")  # sent by name: each process writes to its own
_STATE = {"defaults", "state", "param_groups"}  # what torch pickles of an optimizer
_DEFAULT = getattr(object, "__getstate__", None)  # exists since Python 3.11


def dump(value: Any, *, registries: bool = False, by_file: bool = False) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """Pickle `value`; returns the pickle, and the memory of its tensors and arrays as buffers. Local.

    Args:
        value: Anything.
        registries: Whether to send registries too that hold a part of it, see `Registry`.
        by_file: Whether tensors in files (`file_memory`) are sent as places there; else they are buffers too.

    Raises:
        Refusal: Something in it cannot be pickled.
    """
    stream = io.BytesIO()
    pickler = _dumped(stream, value, [], by_file)
    held = _registries_of(pickler) if registries else []
    if held:
        with contextlib.suppress(Refusal):  # it may hold anything else: then the engine's own stays as it is
            again, before = io.BytesIO(), pickler
            pickler, stream = _dumped(again, value, held, by_file), again
            for buffer in before.buffers:
                buffer.release()
    if pickler.referents:
        _check_held(pickler, value)
    return stream.getvalue(), pickler.buffers


def _registries_of(pickler: _Pickler) -> list[Registry | ClassEntries]:
    """The registries that hold something of what was pickled, and entries of others under its modules' classes."""
    known = pickler.memo.copy()
    held = [one for one in candidates(pickler.modules) if any(id(entry) in known for entry in one.objects)]
    classes = [one for _, one in known.values() if isinstance(one, type) and issubclass(one, nn.Module)]
    return [*held, *(entries for entries in class_entries(classes) if _can_be_pickled(entries))]


def _can_be_pickled(entries: ClassEntries) -> bool:
    try:
        _dumped(io.BytesIO(), entries, [], by_file=True)
    except Refusal:
        return False
    return True


def _dumped(stream: io.BytesIO, value: Any, registries: list[Registry | ClassEntries], by_file: bool) -> _Pickler:
    pickler = _Pickler(stream, by_file=by_file)
    try:
        pickler.dump((_HookNumbers(), value, registries))
    except Refusal:
        raise
    except Exception as error:  # a user's __reduce__ may raise anything
        raise Refusal.of(error, pickler.last) from error
    finally:
        pickler.close()
    return pickler


def load(code: Any, buffers: Sequence[Any]) -> Any:
    """Unpickle; tensors and arrays use the memory of `buffers`. Local."""
    with mapping_together():
        return pickle.loads(code, buffers=buffers)[1]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle has no types
    """Pickles by value, and collects the memory of tensors and arrays in `buffers`.

    Args:
        file: Where the pickle is written.
        known: An earlier pickler, whose storages are not copied again; the referents of weak references are left out
            then.
        by_file: See `dump`.
    """

    def __init__(self, file: io.BytesIO, known: _Pickler | None = None, *, by_file: bool = False) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        self.referents: list[tuple[Any, Any]] = []  # each weak reference, and what it refers to
        self.last: Any = None
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)
        self._strong_only = known is not None
        self._by_file = by_file
        self._storages: dict[tuple[str, int, int], _Storage] = {} if known is None else known._storages
        self.modules: set[str] = set()  # of which something is sent by name
        self._by_value: list[ModuleType] = []
        self._reduce: dict[type, Callable[[Any], Any] | None] = {}
        self._streams = {id(getattr(sys, name)): name for name in reversed(_STREAMS)}

    def reducer_override(self, value: Any) -> Any:
        """Reduce what torch or Python would alter or refuse; everything else is cloudpickle's."""
        self.last = value
        if id(value) in self._streams:
            return getattr, (sys, self._streams[id(value)])
        kind = type(value)  # not isinstance: a weak proxy claims the class of its referent
        if kind not in self._reduce:
            self._reduce[kind] = self._reducer_of(kind)
        reduce = self._reduce[kind]
        reduced = NotImplemented if reduce is None else reduce(value)
        return super().reducer_override(value) if reduced is NotImplemented else reduced

    def _reducer_of(self, kind: type) -> Callable[[Any], Any] | None:
        """How objects of a class are reduced here; None for cloudpickle's way."""
        if issubclass(kind, torch.Tensor):
            return self._tensor
        if issubclass(kind, fx.GraphModule) and kind.__reduce__ is fx.GraphModule.__reduce__:
            return _traced
        if issubclass(kind, nn.Module) and not refused_as(kind):
            return self._module
        if issubclass(kind, torch.optim.Optimizer) and kind.__reduce_ex__ is object.__reduce_ex__:
            return lambda value: (copyreg.__newobj__, (kind,), _state_of(value), None, None, restore)  # type: ignore[attr-defined]
        if kind is torch.UntypedStorage:
            return lambda value: NotImplemented if value.device.type == "meta" else (itself, (self._kept(value),))
        if kind is torch.TypedStorage:
            return lambda value: (typed_storage, (value._untyped_storage, value.dtype))
        if kind in (torch.finfo, torch.iinfo):
            return lambda value: (kind, (getattr(torch, value.dtype),))
        if issubclass(kind, weakref.ref) or kind in _PROXIES or kind in _CONTAINERS:
            return self._weak
        if issubclass(kind, type):
            return self._class
        if issubclass(kind, (FunctionType, ModuleType)):
            return self._definition
        if kind is _CACHED:
            return self._cached
        if kind in LOCKS:
            return sent_lock
        if issubclass(kind, LOCAL) and kind.__reduce_ex__ is object.__reduce_ex__:
            return sent_local
        return _refuse if refused_as(kind) else None

    def _module(self, value: Any) -> Any:
        if not is_parametrized(value):
            return NotImplemented
        return copyreg.__newobj__, (type(value),), _unparametrized_state(value)  # type: ignore[attr-defined]

    def _class(self, value: Any) -> Any:
        self._definition(value)
        reduced = super().reducer_override(value)
        return reduced_class(value, reduced) if is_class_by_value(reduced) else reduced

    def _definition(self, value: Any) -> Any:
        """Let cloudpickle send by value what other processes cannot import."""
        name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
        module = sys.modules.get(name) if isinstance(name, str) and name != "__main__" else None
        if module is None or module in self._by_value:
            return NotImplemented
        if is_importable(module):
            self.modules.add(module.__name__)
        else:
            self._by_value.append(module)
            cloudpickle.register_pickle_by_value(module)
        return NotImplemented

    def _cached(self, value: Any) -> Any:
        """A function with a cache: Python knows it by its name only."""
        module = sys.modules.get(value.__module__)
        found = getattr(module, value.__qualname__, None)
        if module is not None and found is value and value.__module__ != "__main__" and is_importable(module):
            return NotImplemented
        settings = value.cache_parameters()
        return with_cache, (value.__wrapped__, settings), vars(value) or None, None, None, update

    def close(self) -> None:
        """Forget which modules are sent by value. Twice is fine."""
        while self._by_value:
            cloudpickle.unregister_pickle_by_value(self._by_value.pop())

    def _tensor(self, value: Any) -> Any:
        """Reduce a tensor to its class, storage, offset and strides, attributes and hooks."""
        kind: Any = type(value)
        with without_torch_function():
            if issubclass(kind, (UninitializedBuffer, UninitializedParameter)):
                make: Any = kind
                arguments: tuple[Any, ...] = (value.requires_grad, value.data.device, value.data.dtype)
            elif _is_simple(kind) and value.layout is torch.strided and not (value.is_quantized or value.is_nested):
                make, arguments = as_tensor, self._strided(value)
            else:
                return self._as_torch_does(value)
            state = (attributes(value) if slot_names(kind) else vars(value), *_hooks(value), None)
        return (make, arguments, state, None, None, set_attributes) if any(state) else (make, arguments)

    def _strided(self, value: Any) -> tuple[Any, ...]:
        graph = "" if value.grad_fn is None else value.grad_fn.name()
        rare = (graph, value.is_conj(), value.is_neg())
        plain = value.detach()
        if any(rare):
            plain = plain.conj() if plain.is_conj() else plain
            plain = neg_view(plain) if plain.is_neg() else plain
        storage = None if plain.is_meta else self._kept(plain.untyped_storage())
        place = (plain.storage_offset(), tuple(plain.shape), plain.stride())
        return type(value), storage, plain.dtype, *place, value.requires_grad, *(rare if any(rare) else ())

    def _as_torch_does(self, value: torch.Tensor) -> Any:
        """A tensor of another layout, or of a class with its own pickling; what that would lose is refused."""
        plain = type(value) is torch.Tensor
        what = f"a tensor of layout {value.layout}" if plain else f"a {type(value).__name__}"
        if any(_hooks(value)):
            raise Refusal(value, f"{what} with hooks", "remove the hooks")
        if value.grad_fn is not None:
            raise Refusal(value, f"{what} with a graph ({value.grad_fn.name()})", "detach() it")
        if not plain:
            return NotImplemented
        make, arguments = value.detach().__reduce_ex__(5)[:2]
        return make, arguments, (vars(value), None, None, value.requires_grad), None, None, set_attributes

    def _kept(self, storage: torch.UntypedStorage) -> _Storage:
        """One `_Storage` per memory; an empty storage gets its own, because it may be resized later."""
        key = (str(storage.device), storage.data_ptr(), storage.nbytes())
        if not storage.nbytes():
            return _Storage(storage)
        if key not in self._storages:
            self._storages[key] = _Storage(storage, extent_of(storage) if self._by_file else None)
        return self._storages[key]

    def _weak(self, value: Any) -> Any:
        """Reduce a weak reference, proxy or container so that the receiver makes a new one to the same object."""
        kind = type(value)
        if kind in _CONTAINERS:
            if kind is weakref.WeakSet:
                return kind, ([] if self._strong_only else list(value),)
            return kind, ({} if self._strong_only else dict(value),)
        how: tuple[Any, ...]
        if kind in _PROXIES:
            referent, how = value.__reduce_ex__.__self__, (weakref.proxy,)
        elif kind is weakref.ref:
            referent, how = value(), (weakref.ref, value.__callback__)
        elif kind is weakref.WeakMethod:
            method = value()
            referent, how = getattr(method, "__self__", None), (weak_method, getattr(method, "__func__", None))
        else:
            raise Refusal(value, f"a weak reference of a class of its own, {kind.__name__}")
        if referent is None or self._strong_only:
            return dead, ()
        self.referents.append((value, referent))
        return as_weak, (referent, *how)


def _check_held(pickler: _Pickler, value: Any) -> None:
    """Raise if an object is referred to only weakly: at the receiver it would be collected at once, silently."""
    strong = _Pickler(io.BytesIO(), pickler)
    try:
        strong.dump(value)
    finally:
        strong.close()
    held = strong.memo.copy()
    for buffer in strong.buffers:
        buffer.release()
    for reference, referent in pickler.referents:
        if id(referent) not in held:
            kind = type(referent).__name__
            raise Refusal(reference, f"a weak reference to a {kind} that nothing holds which is sent", "hold it, too")


@functools.cache
def _is_simple(kind: type[torch.Tensor]) -> bool:
    """Whether a tensor class adds no data or pickling: a tensor is its storage, offset, strides and attributes."""
    own = (
        kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or kind.__reduce_ex__ not in (torch.Tensor.__reduce_ex__, nn.Parameter.__reduce_ex__)
        or kind.__setstate__ is not torch.Tensor.__setstate__
        or getattr(kind, "__getstate__", None) is not _DEFAULT
    )
    return not own


def _hooks(tensor: Any) -> tuple[Any, Any]:
    """The hook dicts of a leaf; a non-leaf's hooks belong to its graph, which is not sent."""
    if tensor.grad_fn is not None:
        return None, None
    return tensor_hooks(tensor)


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All attributes of an optimizer; or, if its class has a ``__getstate__``, that state and torch's attributes."""
    everything, own = attributes(optimizer), type(optimizer).__getstate__
    if own is torch.optim.Optimizer.__getstate__:
        return everything
    torch_names = {name for name in everything if name in _STATE or name.startswith("_optimizer_")}
    return {**{name: everything[name] for name in torch_names}, **own(optimizer)}


def _unparametrized_state(value: nn.Module) -> Any:
    """A parametrized module's state by its original class: torch's derived class refuses ``__getstate__``."""
    base: Any = type(value).__base__
    own = getattr(base, "__getstate__", None) is not _DEFAULT
    return base.__getstate__(value) if own else dict(vars(value))


def _traced(value: fx.GraphModule) -> Any:
    """A traced module: torch makes it anew from its code, and forgets its hooks and what else a module has."""
    make, arguments = value.__reduce__()
    names = {*vars(nn.Module()), "meta"}
    state = {name: one for name, one in vars(value).items() if name in names}
    return make, arguments, state, None, None, update


def _refuse(value: Any) -> Any:
    what = refused_as(type(value))
    name = getattr(value, "name", None)
    raise Refusal(value, f"{what} ({name!r})" if isinstance(name, str) else what)


class _Storage:
    """A tensor storage to be pickled: once, however many tensors view it; or its place in a file."""

    def __init__(self, storage: torch.UntypedStorage, extent: Extent | None = None) -> None:
        self._original = storage  # kept alive, because the pickler knows it by its address
        self._extent = extent
        self._bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._extent is not None:
            return as_mapped, (self._extent,)
        content: Any = self._bytes.numpy()
        return as_storage, (pickle.PickleBuffer(content),)


class _HookNumbers:
    """Pickled first: hooks have ids, and hooks registered later at the receiver must not reuse those that are sent."""

    def __reduce__(self) -> Any:
        return number_hooks_from, (first_hook_number(),)

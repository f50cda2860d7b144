"""How objects are taken apart to travel: by value, with the memory of tensors and arrays set aside.

What arrives is what left: types, identities, shared memory, attributes, hooks. torch's own pickling drops some of that,
some of it with no more than a warning; what cannot travel is an error here.
"""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.nn.utils.parametrize import is_parametrized
from torch.utils.hooks import RemovableHandle

from nbdist.errors import TaskError

__all__ = ["attributes", "dump", "load"]

_CONTAINERS = (weakref.WeakSet, weakref.WeakKeyDictionary, weakref.WeakValueDictionary)
_PROXIES = (weakref.ProxyType, weakref.CallableProxyType)
_STREAMS = ("stdout", "stderr", "__stdout__", "__stderr__")  # each process writes to its own
_STATE = {"defaults", "state", "param_groups"}  # what torch sends of an optimizer
_DEFAULT = getattr(object, "__getstate__", None)  # there is one since Python 3.11


def dump(value: Any) -> tuple[bytes, list[pickle.PickleBuffer]]:
    """Pickle `value`; returns the pickle, and beside it the memory of its tensors and arrays. Local.

    Raises:
        Exception: Something in it cannot be pickled: whatever a ``__reduce__`` of the user's raises.
    """
    stream = io.BytesIO()
    pickler = _Pickler(stream)
    pickler.dump((_HookNumbers(), value))
    if pickler.referents:
        _check_held(pickler, value)
    return stream.getvalue(), pickler.buffers


def load(code: Any, buffers: Sequence[Any]) -> Any:
    """What was pickled; its tensors and arrays lie in `buffers`. Local."""
    return pickle.loads(code, buffers=buffers)[1]


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc] # cloudpickle has no types
    """Pickles by value and keeps the memory of tensors and arrays aside, as `buffers`.

    Args:
        file: Where the pickle goes.
        known: Of a pickler before this one, whose storages are not copied again; what weak references refer to is
            left out then.
    """

    def __init__(self, file: io.BytesIO, known: _Pickler | None = None) -> None:
        self.buffers: list[pickle.PickleBuffer] = []
        self.referents: list[Any] = []
        super().__init__(file, protocol=5, buffer_callback=self.buffers.append)
        self._strong_only = known is not None
        self._storages: dict[tuple[str, int, int], _Storage] = {} if known is None else known._storages

    def reducer_override(self, value: Any) -> Any:
        """Take apart what torch or Python would change, or refuse; everything else is cloudpickle's."""
        kind = type(value)  # and not isinstance: a proxy says that it is what it refers to
        if issubclass(kind, torch.Tensor):
            return self._tensor(value)
        if issubclass(kind, nn.Module) and is_parametrized(value):
            return copyreg.__newobj__, (kind,), _state_beneath(value)  # type: ignore[attr-defined]
        if issubclass(kind, torch.optim.Optimizer) and kind.__reduce_ex__ is object.__reduce_ex__:
            return copyreg.__newobj__, (kind,), _state_of(value), None, None, _restore  # type: ignore[attr-defined]
        if kind is torch.UntypedStorage and value.device.type != "meta":
            return _itself, (self._kept(value),)
        if kind is torch.TypedStorage:
            return _as_typed_storage, (value._untyped_storage, value.dtype)
        if issubclass(kind, weakref.ref) or kind in _PROXIES or kind in _CONTAINERS:
            return self._weak(value)
        for name in _STREAMS:
            if value is getattr(sys, name):
                return getattr, (sys, name)
        if issubclass(kind, io.IOBase) and not issubclass(kind, (io.BytesIO, io.StringIO)):
            # cloudpickle would put a copy of its content in its place, unasked
            raise pickle.PicklingError(f"it holds an open file ({getattr(value, 'name', value)!r})")
        return super().reducer_override(value)

    def _tensor(self, value: Any) -> Any:
        """A tensor by its class, its place in a storage, its attributes and its hooks."""
        kind: Any = type(value)
        with torch._C.DisableTorchFunctionSubclass():
            if issubclass(kind, (UninitializedBuffer, UninitializedParameter)):
                make: Any = kind
                arguments: tuple[Any, ...] = (value.requires_grad, value.data.device, value.data.dtype)
            elif _is_simple(kind) and value.layout is torch.strided and not (value.is_quantized or value.is_nested):
                make, arguments = _as_tensor, self._taken_apart(value)
            else:
                return self._as_torch_does(value)
            state = (vars(value), *_hooks(value), None)
        return (make, arguments, state, None, None, _dress) if any(state) else (make, arguments)

    def _taken_apart(self, value: Any) -> tuple[Any, ...]:
        graph = "" if value.grad_fn is None else value.grad_fn.name()
        rare = (graph, value.is_conj(), value.is_neg())
        plain = value.detach()
        if any(rare):
            plain = plain.conj() if plain.is_conj() else plain
            plain = torch._neg_view(plain) if plain.is_neg() else plain
        storage = None if plain.is_meta else self._kept(plain.untyped_storage())
        place = (plain.storage_offset(), tuple(plain.shape), plain.stride())
        return type(value), storage, plain.dtype, *place, value.requires_grad, *(rare if any(rare) else ())

    def _as_torch_does(self, value: torch.Tensor) -> Any:
        """A tensor of another layout, or of a class that says itself how it travels; what that loses is refused."""
        plain = type(value) is torch.Tensor
        what = f"a tensor of layout {value.layout}" if plain else f"a {type(value).__name__}"
        if any(_hooks(value)):
            raise pickle.PicklingError(f"it holds {what} with hooks, which cannot go along")
        if value.grad_fn is not None:
            raise pickle.PicklingError(f"it holds {what} with a graph ({value.grad_fn.name()}): detach() it")
        if not plain:
            return NotImplemented
        make, arguments = value.detach().__reduce_ex__(5)[:2]
        return make, arguments, (vars(value), None, None, value.requires_grad), None, None, _dress

    def _kept(self, storage: torch.UntypedStorage) -> _Storage:
        """A storage by its memory; an empty one by itself, for it may grow."""
        key = (str(storage.device), storage.data_ptr(), storage.nbytes())
        if not storage.nbytes():
            return _Storage(storage)
        if key not in self._storages:
            self._storages[key] = _Storage(storage)
        return self._storages[key]

    def _weak(self, value: Any) -> Any:
        """A weak reference, proxy or container, made anew over there."""
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
        else:
            raise pickle.PicklingError(f"it holds a weak reference of a class of its own, {kind.__name__}")
        if referent is None or self._strong_only:
            return _dead, ()
        self.referents.append(referent)
        return _as_weak, (referent, *how)


def _check_held(pickler: _Pickler, value: Any) -> None:
    """Raise where something is only weakly referred to: over there it would be gone at once, and in silence."""
    strong = _Pickler(io.BytesIO(), pickler)
    strong.dump(value)
    held = strong.memo.copy()
    for buffer in strong.buffers:
        buffer.release()
    for referent in pickler.referents:
        if id(referent) not in held:
            raise pickle.PicklingError(
                f"it holds a weak reference to a {type(referent).__name__}, which nothing that is sent holds"
            )


@functools.cache
def _is_simple(kind: type[torch.Tensor]) -> bool:
    """Whether tensors of a class are a place in a storage and attributes, and nothing that the class knows of."""
    own = (
        kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        or kind.__reduce_ex__ not in (torch.Tensor.__reduce_ex__, nn.Parameter.__reduce_ex__)
        or kind.__setstate__ is not torch.Tensor.__setstate__
        or getattr(kind, "__getstate__", None) is not _DEFAULT
    )
    return not (own or copyreg._slotnames(kind))  # type: ignore[attr-defined]


def _hooks(tensor: Any) -> tuple[Any, Any]:
    """The dicts of hooks of a leaf; those of another tensor are its graph's, which stays behind."""
    if tensor.grad_fn is not None:
        return None, None
    return tensor._backward_hooks, tensor._post_accumulate_grad_hooks


def attributes(value: Any) -> dict[str, Any]:
    """What an object keeps under names, in slots too. Local."""
    slots: list[str] = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
    return {**vars(value), **{name: getattr(value, name) for name in slots if hasattr(value, name)}}


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that an optimizer keeps; or what its class wants to be sent, and all that is torch's."""
    everything, own = attributes(optimizer), type(optimizer).__getstate__
    if own is torch.optim.Optimizer.__getstate__:
        return everything
    torchs = {name for name in everything if name in _STATE or name.startswith("_optimizer_")}
    return {**{name: everything[name] for name in torchs}, **own(optimizer)}


def _state_beneath(value: nn.Module) -> Any:
    """The state of a parametrized module as its class had it, before torch derived one from it that refuses."""
    base: Any = type(value).__base__
    own = getattr(base, "__getstate__", None) is not _DEFAULT
    return base.__getstate__(value) if own else dict(vars(value))


class _Storage:
    """A tensor storage on its way; pickled once, however many tensors view it."""

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self._original = storage  # keeps the address, by which the pickler knows it, taken
        self._bytes = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()

    def __reduce_ex__(self, protocol: Any) -> Any:
        content: Any = self._bytes.numpy()
        return _as_storage, (pickle.PickleBuffer(content),)


class _HookNumbers:
    """Goes ahead: hooks are known by numbers, which those that are registered over there must not take again."""

    def __reduce__(self) -> Any:
        return _number_hooks_from, (RemovableHandle.next_id,)


class _LeftBehind(torch.autograd.Function):
    """Where the graph of a tensor was: values may be used, but no gradient goes on from here."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, make: Any, graph: str) -> torch.Tensor:
        ctx.graph = graph
        tensor: torch.Tensor = make()
        return tensor

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise TaskError(
            f"a gradient has come to a tensor that was computed before the training began ({ctx.graph}), whose graph "
            "stays where that was: compute it in the step, or detach() it."
        )


# What runs where the object arrives.


def _number_hooks_from(number: int) -> None:
    RemovableHandle.next_id = max(RemovableHandle.next_id, number)


def _itself(value: Any) -> Any:
    return value


def _as_storage(view: memoryview) -> torch.UntypedStorage:
    return torch.frombuffer(view, dtype=torch.uint8).untyped_storage() if len(view) else torch.UntypedStorage(0)


def _as_typed_storage(storage: torch.UntypedStorage, dtype: torch.dtype) -> torch.TypedStorage:
    return torch.TypedStorage(wrap_storage=storage, dtype=dtype, _internal=True)


def _as_tensor(
    kind: type[torch.Tensor], storage: torch.UntypedStorage | None, dtype: torch.dtype, offset: int,
    shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool, graph: str = "", conj: bool = False,
    neg: bool = False,
) -> torch.Tensor:  # fmt: skip
    def make() -> torch.Tensor:
        if storage is None:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
        tensor = tensor.conj() if conj else tensor
        return torch._neg_view(tensor) if neg else tensor

    if graph:
        with torch.enable_grad():
            tensor: torch.Tensor = _LeftBehind.apply(torch.zeros((), requires_grad=True), make, graph)  # type: ignore[no-untyped-call]
        return tensor if kind is torch.Tensor else tensor.as_subclass(kind)
    if kind is torch.Tensor:
        return make().requires_grad_(requires_grad)
    return torch.Tensor._make_subclass(kind, make(), requires_grad)


def _dress(tensor: Any, state: tuple[dict[str, Any], Any, Any, bool | None]) -> None:
    """Give a tensor what it has beside its values: its hooks in the very dicts that their handles know."""
    attributes, before, after, requires_grad = state
    if requires_grad is not None:
        tensor.requires_grad_(requires_grad)
    vars(tensor).update(attributes)
    if before:
        tensor._backward_hooks = before
    if after:
        tensor._post_accumulate_grad_hooks = after


def _restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    slots: list[str] = copyreg._slotnames(type(optimizer))  # type: ignore[attr-defined]
    optimizer.__setstate__({name: value for name, value in state.items() if name not in slots})
    for name in state.keys() & set(slots):
        setattr(optimizer, name, state[name])


def _as_weak(referent: Any, make: Any, *callback: Any) -> Any:
    return make(referent, *callback)


class _Gone:
    """What a dead weak reference refers to."""


def _dead() -> Any:
    return weakref.ref(_Gone())

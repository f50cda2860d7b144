"""What unpickling calls at the receiver: tensors, storages and weak references are made, attributes and hooks set."""

from __future__ import annotations

import functools
import weakref
from types import MethodType
from typing import Any

import torch

from nbdist.core.transfer.file_memory import Extent, map_extent
from nbdist.core.transfer.slots import slot_names
from nbdist.errors import TaskError
from nbdist.upstream.torch_private import make_subclass, neg_view, set_tensor_hooks

__all__ = [
    "as_mapped",
    "as_storage",
    "as_tensor",
    "as_weak",
    "dead",
    "itself",
    "restore",
    "set_attributes",
    "update",
    "weak_method",
    "with_cache",
]


class _DroppedGraph(torch.autograd.Function):
    """In place of a tensor's autograd graph, which is not sent: the value can be used, but backward raises."""

    @staticmethod
    def forward(ctx: Any, _anchor: torch.Tensor, make: Any, graph: str) -> torch.Tensor:
        ctx.graph = graph
        tensor: torch.Tensor = make()
        return tensor

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise TaskError(
            f"backward reached a tensor that was computed before the training began ({ctx.graph}), and whose graph "
            "was not sent to the engines: compute it in the step, or detach() it."
        )


def itself(value: Any) -> Any:
    """The value."""
    return value


def as_mapped(extent: Extent) -> torch.UntypedStorage:
    """A storage that is a private mapping of a part of a file."""
    return map_extent(extent).untyped_storage()


def as_storage(view: memoryview) -> torch.UntypedStorage:
    """A storage in the memory of a buffer."""
    return torch.frombuffer(view, dtype=torch.uint8).untyped_storage() if len(view) else torch.UntypedStorage(0)


def as_tensor(
    kind: type[torch.Tensor], storage: torch.UntypedStorage | None, dtype: torch.dtype, offset: int,
    shape: tuple[int, ...], stride: tuple[int, ...], requires_grad: bool, graph: str = "", conj: bool = False,
    neg: bool = False,
) -> torch.Tensor:  # fmt: skip
    """A tensor of a class; `graph` names the one it had."""

    def make() -> torch.Tensor:
        if storage is None:
            tensor = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        else:
            tensor = torch.empty(0, dtype=dtype).set_(storage, offset, shape, stride)
        tensor = tensor.conj() if conj else tensor
        return neg_view(tensor) if neg else tensor

    if graph:
        with torch.enable_grad():
            tensor: torch.Tensor = _DroppedGraph.apply(torch.zeros((), requires_grad=True), make, graph)  # type: ignore[no-untyped-call]
        return tensor if kind is torch.Tensor else tensor.as_subclass(kind)
    if kind is torch.Tensor:
        return make().requires_grad_(requires_grad)
    return make_subclass(kind, make(), requires_grad)


def set_attributes(tensor: Any, state: tuple[dict[str, Any], Any, Any, bool | None]) -> None:
    """Set a tensor's attributes and hooks; the hook dicts are the objects that the `RemovableHandle`s refer to."""
    attributes, before, after, requires_grad = state
    if requires_grad is not None:
        tensor.requires_grad_(requires_grad)
    slots = set(slot_names(type(tensor)))
    vars(tensor).update({name: value for name, value in attributes.items() if name not in slots})
    for name in attributes.keys() & slots:
        setattr(tensor, name, attributes[name])
    if before or after:
        set_tensor_hooks(tensor, before, after)


def restore(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Set all attributes of an optimizer."""
    slots = slot_names(type(optimizer))
    optimizer.__setstate__({name: value for name, value in state.items() if name not in slots})
    for name in state.keys() & set(slots):
        setattr(optimizer, name, state[name])


def update(value: Any, state: dict[str, Any]) -> None:
    """Set attributes of an object."""
    vars(value).update(state)


def with_cache(function: Any, settings: dict[str, Any]) -> Any:
    """A function with an empty cache."""
    return functools.lru_cache(**settings)(function)


def weak_method(owner: Any, function: Any) -> Any:
    """A weak reference to a bound method."""
    return weakref.WeakMethod(MethodType(function, owner))


def as_weak(referent: Any, make: Any, *rest: Any) -> Any:
    """A weak reference, or proxy."""
    return make(referent, *rest)


class _Gone:
    """The referent of a dead weak reference."""


def dead() -> Any:
    """A weak reference to nothing."""
    return weakref.ref(_Gone())
